"""What a machine does at best, measured: bytes and exponentials per second, and what a call takes."""

import functools
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

GPU_BUFFER = 1 << 30


@dataclass(frozen=True)
class Work:
    """What an ideal kernel does: bytes that it reads and writes, each once, and exponentials."""

    read: int
    written: int
    exponentials: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> Callable[[], float]:
    """Of one thread on a CPU its processor time, which nobody else on the machine lengthens; else the wall's."""
    return time.thread_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def seconds(call: Callable[[], object], device: str, now: Callable[[], float] = time.perf_counter) -> float:
    sync(device)
    start = now()
    kept = call()
    sync(device)
    taken = now() - start
    del kept  # freeing the results is no part of the call
    return taken


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


def _bindings() -> ModuleType | None:
    """The extension, where it is built and new enough to measure."""
    try:
        found = importlib.import_module("tokenrl._bindings")
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


PRODUCT_FLOPS = 1 << 37  # of a sample: tenths of a second on two cores


def products(device: str, dtype: torch.dtype, tokens: int, hidden: int, columns: int) -> dict[str, float]:
    """Flops per second of the three matrix products of a head, "logits", "hidden" and "weight", by torch.mm; of fewer
    columns where all of them would take long."""
    columns = max(min(columns, PRODUCT_FLOPS // (2 * tokens * hidden)), 1)
    return _products(device, dtype, tokens, hidden, columns, torch.get_num_threads())


@functools.cache
def _products(
    device: str, dtype: torch.dtype, tokens: int, hidden: int, columns: int, threads: int
) -> dict[str, float]:
    sizes = ((tokens, hidden), (columns, hidden), (tokens, columns))
    states, weight, logits = (torch.zeros(*size, dtype=dtype, device=device) for size in sizes)
    calls = {
        "logits": lambda: torch.mm(states, weight.t(), out=logits),
        "hidden": lambda: torch.mm(logits, weight, out=states),
        "weight": lambda: torch.mm(logits.t(), states, out=weight),
    }
    flops, now = 2 * tokens * hidden * columns, clock(device)
    for call in calls.values():
        call()
    return {name: flops / min(seconds(call, device, now) for _ in range(3)) for name, call in calls.items()}


def launch(device: str) -> float:
    """Seconds that a small operation takes, most of them to be launched."""
    x, calls = torch.zeros(64, 8, device=device), 100
    return min(seconds(lambda: [x + 1 for _ in range(calls)], device, clock(device)) for _ in range(8)) / calls
