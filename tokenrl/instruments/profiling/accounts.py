"""From the events of torch.profiler to what each op cost: an account per range (tokenrl/ops/ranges.py), those of ops
inside of ops in theirs."""

import time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.autograd import DeviceType

from ...ops.ranges import PREFIX, memory_watchers

STEP, COUNTING = "tokenrl.profile: the step", "tokenrl.profile: counting rows"  # ranges of our own
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = ("aten::_local_scalar_dense",)  # of a number by the host
# Operations that do no work: they allocate, look at memory in another way, or name a dtype.
FREE = frozenset(
    f"aten::{name}"
    for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "view", "reshape", "expand", "expand_as", "detach",
        "slice", "select", "as_strided", "squeeze", "unsqueeze", "alias", "lift_fresh", "t", "transpose", "split",
        "narrow", "promote_types",
    )
)  # fmt: skip
COPIES = ("Memcpy", "Memset")
MADE_OF_OPS = "linear_"  # ops that are written over others
NAMESPACES = ("tokenrl::", "tokenrl_")


@dataclass
class Account:
    """Of all calls of one range, in seconds; begin: of the first. path: the names of the ranges around it, and its own.
    launches: kernels on a GPU, elsewhere operations, without those that they are made of and those that only look at
    memory. products_*: of the matrix products in it but not in a range inside; flops: theirs. syncs: how often the host
    waited for the device, on a CPU how many numbers it read."""

    path: tuple[str, ...]
    begin: float = 0.0
    calls: int = 0
    launches: int = 0
    host: float = 0.0
    device: float = 0.0
    products: int = 0
    products_host: float = 0.0
    products_device: float = 0.0
    flops: int = 0
    syncs: int = 0
    peak: int = 0
    kernels: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def seconds(self) -> float:
        """On the device where there is one."""
        return self.device or self.host


@dataclass(frozen=True)
class Span:
    """A range on the timeline, in seconds from the beginning of the step. depth: how many are around it."""

    name: str
    begin: float
    end: float
    depth: int


@dataclass
class Memory:
    """Bytes held beyond what was held at the beginning, after each allocation and release, in seconds."""

    times: list[float]
    held: list[int]

    def most(self, begin: float, end: float) -> int:
        """Between two times, beyond what was held at the first."""
        first, last = bisect_left(self.times, begin), bisect_right(self.times, end)
        before = self.held[first - 1] if first else 0
        return max(self.held[first:last], default=before) - before


@dataclass
class Step:
    """Everything inside. order: the paths of all calls, as they began. wall: its seconds; busy: those in which the
    device worked. spans: of our ranges; other_spans: of the operations outside of them, kernel_spans: of the device.
    others: the operations that are not ours, with the seconds that they took themselves."""

    total: Account
    accounts: dict[tuple[str, ...], Account]
    order: list[tuple[str, ...]]
    spans: list[Span]
    other_spans: list[Span]
    kernel_spans: list[Span]
    memory: Memory
    wall: float
    busy: float
    others: Counter[str]

    @property
    def ours(self) -> list[Account]:
        """Those in no other, as they began."""
        return self._under(())

    def inside(self, account: Account) -> list[Account]:
        """Those directly inside of another."""
        return self._under(account.path)

    def _under(self, path: tuple[str, ...]) -> list[Account]:
        found = [account for account in self.accounts.values() if account.path[:-1] == path]
        return sorted(found, key=lambda account: account.begin)


def step_of(profiled: Any, on_gpu: bool, more_memory: Sequence[tuple[int, int]] = ()) -> Step:
    """Of a torch.profiler.profile that has ended and had one range STEP. more_memory: of other_memory."""
    events = list(profiled.events())
    whole = next(event for event in events if event.name == STEP and event.device_type == DeviceType.CPU)
    reader = _Reader(whole.time_range.start, on_gpu)
    for event in events:
        if event.device_type == DeviceType.CPU and event.cpu_parent is None and not event.is_async:
            reader.read(event, (), False)
    kernels = sorted(_kernels(events, whole.time_range.start), key=lambda span: span.begin)
    wall = max([whole.time_range.end - whole.time_range.start, *(1e6 * span.end for span in kernels)]) / 1e6
    memory = _memory(profiled, whole.time_range, on_gpu, () if on_gpu else more_memory)
    for account, begin, end in reader.windows:
        account.peak = max(account.peak, memory.most(begin, end))
    reader.total.peak = memory.most(0.0, wall)
    reader.total.host = wall
    order = [account.path for account, *_ in sorted(reader.windows, key=lambda window: window[1])]
    return Step(
        reader.total, reader.accounts, order, reader.spans, reader.other_spans, kernels, memory, wall,
        _covered(kernels), reader.others,
    )  # fmt: skip


class _Reader:
    """Goes down the trees of events. origin: microseconds at which the step began."""

    def __init__(self, origin: float, on_gpu: bool):
        self.origin, self.on_gpu = origin, on_gpu
        self.total = Account((STEP,), calls=1)
        self.accounts: dict[tuple[str, ...], Account] = {}
        self.windows: list[tuple[Account, float, float]] = []
        self.spans: list[Span] = []
        self.other_spans: list[Span] = []
        self.others: Counter[str] = Counter()

    def read(self, event: Any, around: tuple[Account, ...], in_op: bool) -> None:
        """around: the accounts of the ranges around it. in_op: whether it is part of an operation that is counted."""
        waiting = [(event, around, in_op)]
        while waiting:
            event, around, in_op = waiting.pop()
            if event.name == COUNTING:
                for account in around:
                    account.host -= _host(event)
                continue
            if event.name != STEP:
                around, in_op = self._booked(event, around, in_op)
            waiting += [(child, around, in_op) for child in event.cpu_children]

    def _booked(self, event: Any, around: tuple[Account, ...], in_op: bool) -> tuple[tuple[Account, ...], bool]:
        """What is around the event's children, and whether they are part of an operation."""
        if name := _range_name(event, around):
            return (*around, self._open(name, event, around)), in_op
        counts = _is_operation(event) and not in_op
        kernels = [kernel for kernel in event.kernels if not kernel.name.startswith(COPIES)]
        for account in (self.total, *around):
            account.launches += len(kernels) if self.on_gpu else counts
            account.device += sum(kernel.duration for kernel in event.kernels) / 1e6
            account.syncs += event.name in (WAITS if self.on_gpu else READS)
        inner = around[-1] if around else self.total
        for kernel in kernels:
            booked = inner.kernels[kernel.name]
            booked[0], booked[1] = booked[0] + 1, booked[1] + kernel.duration / 1e6
        if event.name in PRODUCTS and around:
            inner.products += 1
            inner.flops += event.flops or 0
            inner.products_host += _host(event)
            inner.products_device += event.device_time_total / 1e6
        if not around:
            if event.cpu_parent is None or event.cpu_parent.name == STEP:
                self.other_spans.append(self._span(event.name, event, 0))
            self.others[event.name] += (
                event.self_device_time_total if self.on_gpu else event.self_cpu_time_total
            ) / 1e6
        return around, in_op or counts

    def _open(self, name: str, event: Any, around: tuple[Account, ...]) -> Account:
        path = (*(around[-1].path if around else ()), name)
        span = self._span(name, event, len(around))
        account = self.accounts.setdefault(path, Account(path, span.begin))
        account.begin = min(account.begin, span.begin)
        account.calls += 1
        account.host += _host(event)
        self.windows.append((account, span.begin, span.end))
        self.spans.append(span)
        return account

    def _span(self, name: str, event: Any, depth: int) -> Span:
        begin, end = ((time - self.origin) / 1e6 for time in (event.time_range.start, event.time_range.end))
        return Span(name, begin, end, depth)


def _host(event: Any) -> float:
    return (event.time_range.end - event.time_range.start) / 1e6


def _range_name(event: Any, around: tuple[Account, ...]) -> str | None:
    """Of a range; of an op that has none, inside of a graph of torch.compile, the same without dtype and backend."""
    if event.name.startswith(PREFIX) and " " in event.name:
        return event.name
    if not event.name.startswith(NAMESPACES) or "::" not in event.name:
        return None
    op, backward, _ = event.name.split("::")[1].partition("_backward")
    name = f"{PREFIX}{op} {'backward' if backward else 'forward'} "
    return None if around and around[-1].name.startswith(name) else f"{name}in a graph"


def _is_operation(event: Any) -> bool:
    if event.name.startswith("aten::"):
        return event.name not in FREE
    return event.name.startswith(NAMESPACES) and not event.name.split("::")[-1].startswith(MADE_OF_OPS)


def _kernels(events: Iterable[Any], origin: float) -> Iterable[Span]:
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation and not event.name.startswith(PREFIX):
            begin, end = event.time_range.start - origin, event.time_range.end - origin
            yield Span(event.name, begin / 1e6, end / 1e6, 0)


def _covered(spans: list[Span]) -> float:
    """Seconds in which there is at least one of the spans, which are sorted."""
    covered, until = 0.0, 0.0
    for span in spans:
        covered += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return covered


@contextmanager
def other_memory() -> Iterator[list[tuple[int, int]]]:
    """Bytes that come or, negative, go inside on the CPU and are not torch's, with nanoseconds since the epoch."""
    found: list[tuple[int, int]] = []

    def told(nbytes: int) -> None:
        found.append((time.time_ns(), nbytes))

    memory_watchers.append(told)
    try:
        yield found
    finally:
        memory_watchers.remove(told)


def torch_memory(profiled: Any, on_gpu: bool) -> list[tuple[int, int]]:
    """The same of torch's, or of the GPU's, while it profiled."""
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = profiled.profiler.kineto_results.events()
    return [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.device_type() == kind]


def _memory(profiled: Any, step: Any, on_gpu: bool, more: Sequence[tuple[int, int]]) -> Memory:
    origin = profiled.profiler.kineto_results.trace_start_ns() + 1000 * step.start
    times, held, now = [], [], 0
    for nanoseconds, change in sorted([*torch_memory(profiled, on_gpu), *more]):
        at = (nanoseconds - origin) / 1e9
        if 0 <= at <= (step.end - step.start) / 1e6:
            now += change
            times.append(at)
            held.append(now)
    return Memory(times, held)
