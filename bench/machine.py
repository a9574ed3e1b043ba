"""The machine of a benchmark: its allocator, and the line that describes it."""

import ctypes
import functools
import os
import platform

import torch

from tokenrl.instruments.machine import bf16_instructions, machine_name
from tokenrl.instruments.machine_limits import limits

from .competitors import versions

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@functools.cache
def keep_freed_memory() -> str:
    """Has malloc keep what is freed, as CUDA's caching allocator does; returns what came of it, in words.

    Else each call that allocates 1 GB pays for its first touch anew: the kernel clears every page, and on a virtual
    machine the host may have to find it. That takes longer than the call's own work, and tells nothing about it. Small
    pages defeat this, though: glibc before 2.38 does not find a freed block of 64-byte alignment again, it finds one
    aligned to pages, as torch asks for huge ones where THP_MEM_ALLOC_ENABLE says so at its first allocation.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if platform.libc_ver()[0] != "glibc":
        return "malloc as it is (no glibc)"
    malloc = ctypes.CDLL(None)
    kept = malloc.mallopt(M_MMAP_MAX, 0) == 1 and malloc.mallopt(M_TRIM_THRESHOLD, -1) == 1
    return "freed memory kept, huge pages" if kept else "malloc as it is (mallopt failed)"


def machine_line(device: str, load: float, allocator: str) -> str:
    """What ran this, what it does at best, and how busy others kept it before the start."""
    found = limits(device)
    on_cpu = f"; {bf16_instructions() or 'no x86'}; {allocator}" if device == "cpu" else ""
    return (
        f"{machine_name(device)}, {torch.get_num_threads()} threads{on_cpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, {versions()}; read {found.read / 1e9:.1f} GB/s, copy {found.copy / 1e9:.1f} GB/s, "
        f"{found.exponentials / 1e9:.2f} G exponentials/s ({found.source}); load before the start {load:.1f}"
    )
