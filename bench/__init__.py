"""Benchmarks: python -m bench from a checkout, tokenrl bench where it is installed."""
