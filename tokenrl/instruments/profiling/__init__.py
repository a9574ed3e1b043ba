"""What stands behind tokenrl.profile (tokenrl/instruments/profiler.py)."""
