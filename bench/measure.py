"""Times, peak memory, launches and host syncs of calls, and the limits of the machine they ran on."""

import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from .case import Case, Work
from .check import results

SAMPLING_SECONDS = 20.0  # of one call, after which it has samples enough
FEWEST_SAMPLES = 3
SLOW_SECONDS = 60.0  # of one call of a competitor, which then has but this sample
GPU_BUFFER = 1 << 30


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def thunk(case: Case, call: Callable, backward: bool) -> Callable[[], object]:
    """The call on the case's inputs: its forward, with what the backward needs or alone, or forward and backward."""

    def forward() -> object:
        with torch.set_grad_enabled(case.forward_saves):
            return call(*case.inputs)

    return functools.partial(results, call, case.inputs, case.cotangents, case.leaves) if backward else forward


def seconds(call: Callable[[], object], device: str) -> float:
    sync(device)
    start = time.perf_counter()
    kept = call()
    sync(device)
    taken = time.perf_counter() - start
    del kept  # freeing the results is no part of the call
    return taken


def paired_samples(
    calls: dict[str, Callable[[], object]], device: str, repeats: int, rivals: frozenset[str] = frozenset()
) -> dict[str, list[float]]:
    """Seconds of each call, the calls taking turns so that the machine's noise falls on all of them.

    A call that has used SAMPLING_SECONDS sits out the remaining turns, but not before it has FEWEST_SAMPLES; one of the
    rivals that takes more than SLOW_SECONDS runs once. Each has run before: it is compiled and warm.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}

    def enough(name: str) -> bool:
        taken = times[name]
        if name in rivals and taken and taken[0] > SLOW_SECONDS:
            return True
        return len(taken) >= FEWEST_SAMPLES and sum(taken) >= SAMPLING_SECONDS

    for _ in range(max(repeats, FEWEST_SAMPLES)):
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
    # The tiles of the linear ops are numpy's; torch's profiler counts what torch allocates.
    counted = mock.patch("numpy.empty", lambda nbytes, _: torch.empty(nbytes, dtype=torch.uint8).numpy())
    with counted, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = call()
    del kept
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
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


@dataclass(frozen=True)
class Limits:
    """Per second: bytes read, bytes copied (read plus written), exponentials. source: how they were measured."""

    read: float
    copy: float
    exponentials: float
    source: str

    def least(self, work: Work) -> tuple[float, str]:
        """(seconds, name of the limit) that the work takes at best."""
        moved, name = (work.bytes / self.copy, "copy") if work.written else (work.read / self.read, "read")
        computed = work.exponentials / self.exponentials
        return (computed, "exp") if computed > moved else (moved, name)


def _rate(amount: float, call: Callable[[], object], device: str) -> float:
    return amount / min(seconds(call, device) for _ in range(8))


def _bindings():
    """The extension, where it is built and new enough to measure."""
    try:
        from tokenrl import _bindings as found
    except ImportError:
        return None
    return found if hasattr(found, "measure_read") else None


def _exponentials_cuda() -> tuple[float, str]:
    """In registers, by a kernel compiled at run time; where that fails by torch.exp on a tensor that fits the cache."""
    x, rounds = torch.full((1 << 22,), -1.0, device="cuda"), 256
    try:
        from torch.cuda.jiterator import _create_jit_fn

        code = f"template <typename T> T chain(T x) {{ for (int i = 0; i < {rounds}; ++i) x = exp(-x); return x; }}"
        chain = _create_jit_fn(code)
        chain(x)
        return _rate(rounds * x.numel(), lambda: chain(x), "cuda"), "exp in registers"
    except Exception:  # no NVRTC, or a torch without the jiterator
        y = torch.empty_like(x)
        return _rate(x.numel(), lambda: torch.exp(x, out=y), "cuda"), "torch.exp in the cache"


def _torch_limits(device: str, size: int) -> tuple[float, float]:
    """(read, copy) by torch's own sum and copy."""
    x = torch.zeros(max(size // 4, 1), device=device)
    y = torch.zeros_like(x)
    copy = _rate(8 * x.numel(), lambda: y.copy_(x), device)
    return max(copy, _rate(4 * x.numel(), x.sum, device)), copy


@functools.cache
def _limits(device: str, size: int, threads: int) -> Limits:
    if device == "cuda":
        rate, how = _exponentials_cuda()
        return Limits(*_torch_limits(device, GPU_BUFFER), rate, f"torch copy_ and sum, {how}")
    native = _bindings()
    if native is None:
        x = torch.zeros(1 << 15)
        rate = _rate(1000 * x.numel(), lambda: [torch.exp(x, out=x) for _ in range(1000)], device)
        return Limits(*_torch_limits(device, size), rate, "torch (tokenrl._bindings is not built)")
    read, copy = native.measure_read(size, threads), native.measure_copy(size, threads)
    return Limits(read, copy, native.measure_exponentials(1 << 27, threads), "csrc/cpu/machine_limits.cpp")


def limits(device: str, size: int = 1 << 29) -> Limits:
    """Of a buffer as large as what a case reads, to a power of two, since small ones stay in the caches of a CPU."""
    return _limits(device, min(1 << max(size - 1, 1).bit_length(), 1 << 29), torch.get_num_threads())
