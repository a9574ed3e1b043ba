"""Benchmarks: python -m bench."""

import os

# Before torch loads: its profiler would report every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
