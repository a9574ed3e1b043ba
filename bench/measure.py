"""Times, peak memory, launches and host syncs of calls."""

import functools
import os
import warnings
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from tokenrl.instruments.machine_limits import seconds, sync
from tokenrl.instruments.profiling.accounts import other_memory, torch_memory

from .case import Case
from .check import results

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at its first use: it would report every start and stop
SAMPLING_SECONDS = 20.0  # of one call, after which it has samples enough
FEWEST_SAMPLES = 3
SLOW_SECONDS = 60.0  # of one call of a competitor, which then has but this sample


def thunk(case: Case, call: Callable, backward: bool) -> Callable[[], object]:
    """The call on the case's inputs: its forward, with what the backward needs or alone, or forward and backward."""

    def forward() -> object:
        with torch.set_grad_enabled(case.forward_saves):
            return call(*case.inputs)

    return functools.partial(results, call, case.inputs, case.cotangents, case.leaves) if backward else forward


def paired_samples(
    calls: dict[str, Callable[[], object]],
    device: str,
    repeats: int,
    rivals: frozenset[str] = frozenset(),
    turns: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, list[float]]:
    """Seconds of each call, the calls taking turns so that the machine's noise falls on all of them. turns: what goes
    through them, a progress bar for one.

    A call that has used SAMPLING_SECONDS sits out the remaining turns, but not before it has FEWEST_SAMPLES; one of the
    rivals that takes more than SLOW_SECONDS runs once. Each has run before: it is compiled and warm.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}

    def enough(name: str) -> bool:
        taken = times[name]
        if name in rivals and taken and taken[0] > SLOW_SECONDS:
            return True
        return len(taken) >= FEWEST_SAMPLES and sum(taken) >= SAMPLING_SECONDS

    for _ in turns(range(max(repeats, FEWEST_SAMPLES))):
        for name, call in calls.items():
            if not enough(name):
                times[name].append(seconds(call, device))
    return times


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes that a call holds at most beyond what was allocated before it, its results included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with other_memory() as others, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = call()
    del kept
    held = peak = 0
    for _, change in sorted([*torch_memory(profiled, on_gpu=False), *others]):
        held += change
        peak = max(peak, held)
    return peak


def _is_op(event) -> bool:
    return event.name.startswith(("aten::", "tokenrl"))


def _inside_op(event) -> bool:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if _is_op(event):
            return True
    return False


def launches(call: Callable[[], object], device: str) -> int:
    """CUDA kernels that a call launches; on CPU the ops that it dispatches, those inside other ops left out."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    sync(device)
    with profile(activities=activities) as profiled:
        call()
        sync(device)
    if device == "cuda":
        kernels = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)
    return sum(_is_op(e) and not _inside_op(e) for e in profiled.events())


def host_syncs(call: Callable[[], object], device: str) -> int | None:
    """How often a call waits for the GPU, by torch's own warnings; None on CPU, where nothing can."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)
