"""Benchmarks: python -m bench."""

import os

# Before torch loads: its profiler would report every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# Before torch allocates: with small pages the first touch of 1 GB takes as long as a GEMM; see machine.py.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
