"""tokenrl.profile: what a training step costs, op by op. Built on torch.profiler and the ranges of the ops."""

import importlib
import os
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from ..batch.checks import check_name
from ..observed import observing
from ..ops import ranges
from ..ops.ranges import Range
from .machine import described_machine
from .machine_limits import Work, sync
from .output import finite
from .profiling import report, tables
from .profiling.accounts import COUNTING, STEP, Step, other_memory, step_of
from .profiling.lines import Line, lines_of
from .profiling.observed_loss import ObservedLoss
from .ratios import ByPosition
from .work import Amount, Formula, work_of

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at its first use: it would report every start and stop


class Profile:
    """What the step cost, once its `with` has ended."""

    def __init__(self, device: str):
        self.device = device
        self.loss = ObservedLoss()
        self._pending: list[tuple[str, Formula, Amount]] = []
        self._profiled: torch_profile | None = None

    def watch(self, range: Range) -> None:
        """Keeps what the work of a call is computed from; a count of rows stays on the device until the end."""
        with record_function(COUNTING), torch.no_grad():
            if (work := work_of(range)) is not None:
                self._pending.append((range.name, *work))

    def observe(self, function: str, arguments: Mapping[str, Any], result: Any) -> None:
        with record_function(COUNTING), torch.no_grad():
            self.loss.observe(function, arguments, result)

    def ended(self, profiled: torch_profile, memory: list[tuple[int, int]]) -> None:
        """memory: of other_memory."""
        self._profiled, self._memory = profiled, memory

    @cached_property
    def step(self) -> Step:
        return step_of(self._ran, self.device == "cuda", self._memory)

    @property
    def _ran(self) -> torch_profile:
        if self._profiled is None:
            raise RuntimeError("profile: read inside its with, accepted: after it has ended.")
        return self._profiled

    @cached_property
    def works(self) -> dict[tuple[str, ...], Work]:
        """Of all calls of a range, by its path. Those of one name began in the order in which they were watched."""
        found: dict[tuple[str, ...], Work] = defaultdict(lambda: Work(0, 0, 0))
        watched: dict[str, deque[tuple[Formula, Amount]]] = defaultdict(deque)
        for name, formula, amount in self._pending:
            watched[name].append((formula, amount))
        for path in self.step.order:
            if watched[path[-1]]:
                formula, amount = watched[path[-1]].popleft()
                one, more = found[path], formula(int(amount))
                found[path] = Work(*(a + b for a, b in zip(astuple(one), astuple(more), strict=True)))
        return found

    @cached_property
    def lines(self) -> list[Line]:
        """The limits beside them are measured at the first call, which takes seconds on a CPU."""
        return lines_of(self.step, self.works, self.device)

    @cached_property
    def ratios(self) -> ByPosition | None:
        """Ratios and clips of the step's first loss, by position; None, with a reason in loss.reason, without one."""
        return self.loss.ratios()

    @cached_property
    def machine(self) -> dict[str, Any]:
        return described_machine(self.device)

    @cached_property
    def kernels(self) -> list[dict[str, Any]]:
        """Registers, shared memory and occupancy of the package's own CUDA kernels, of the ops that ran."""
        ran = {line.what.split()[0] for line in self.lines if line.backend == "cuda"}
        if not ran:
            return []
        attributes = importlib.import_module("tokenrl._bindings").kernel_attributes()
        return [row for row in attributes if row["name"].split()[0].removesuffix("_backward") in ran]

    def table(self) -> str:
        """80 columns wide."""
        return tables.text(tables.of_profile(self))

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it: {"machine", "step", "ops": one for each line of the table, in seconds and bytes}."""
        step = self.step
        whole = {
            "seconds": step.wall, "device_seconds": step.busy, "launches": step.total.launches,
            "host_syncs": step.total.syncs, "peak_bytes": step.total.peak,
        }  # fmt: skip
        others = dict(step.others.most_common(tables.OTHERS))
        return finite(
            {"machine": self.machine, "step": whole, "ops": [line.as_dict() for line in self.lines], "others": others}
        )

    def trace(self, path: str | Path) -> None:
        """Writes a Chrome trace, for Perfetto or chrome://tracing, with the range of each op."""
        self._ran.export_chrome_trace(str(path))

    def html(self, path: str | Path, title: str = "tokenrl profile", before: Sequence[report.Section] = ()) -> None:
        """Writes one page that needs nothing else: the table, the roofline, a timeline, memory, ratios and clips by
        position, the machine. Needs matplotlib. before: sections that come first."""
        Path(path).write_text(report.page(self, title, before), encoding="utf-8")


@contextmanager
def profile(device: str | None = None) -> Iterator[Profile]:
    """Profiles the training step inside.

        with tokenrl.profile() as p:
            training_step()
        print(p.table())
        p.trace("step.json")
        p.html("report.html")

    Each op of tokenrl, forward and backward, has a line: calls, launches (kernels on a GPU, operations on a CPU), time
    of the host and of the device, bytes, flops and exponentials by a model, the rates that these come to beside what
    this machine does at best (measured when a table is asked for), peak memory and how often the host waits. Ops inside
    of ops, and the matrix products between them, are listed below theirs; all else is one line. Run the step once
    before: a first call compiles and warms up. Profiling itself costs the host microseconds per operation of torch.

    The reference's backward is autograd's own, and lies in the last line; so does what torch.compile has fused. Nothing
    else that uses torch.profiler may be at work.

    Args:
        device: where the step works, "cpu" or "cuda"; None: on the GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_name("device", device, ("cpu", "cuda"))
    found = Profile(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    ours = torch_profile(activities=activities, record_shapes=True, profile_memory=True, with_flops=True)
    with other_memory() as memory, ours as profiled:
        ranges.watchers.append(found.watch)
        try:
            with observing(found.observe), record_function(STEP):
                yield found
            sync(device)  # what is still at work belongs to the step
        finally:
            ranges.watchers.remove(found.watch)
    found.ended(profiled, memory)
