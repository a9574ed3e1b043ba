"""tokenrl.profile: what a training step costs, op by op. Built on torch.profiler and the ranges of the ops."""

import importlib
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from ..ops import ranges
from ..ops.ranges import Range
from .machine import described_machine
from .machine_limits import Work, sync
from .output import finite
from .profiling import tables
from .profiling.accounts import COUNTING, STEP, Step, step_of
from .profiling.lines import Line, lines_of
from .work import Amount, Formula, work_of

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read at its first use: it would report every start and stop


class Profile:
    """What the step cost, once its `with` has ended."""

    def __init__(self, device: str):
        self.device = device
        self._pending: list[tuple[str, Formula, Amount]] = []
        self._profiled: torch_profile | None = None

    def watch(self, range: Range) -> None:
        """Keeps what the work of a call is computed from; a count of rows stays on the device until the end."""
        with record_function(COUNTING), torch.no_grad():
            if (work := work_of(range)) is not None:
                self._pending.append((range.name, *work))

    def ended(self, profiled: torch_profile) -> None:
        self._profiled = profiled

    @cached_property
    def step(self) -> Step:
        return step_of(self._ran, self.device == "cuda")

    @property
    def _ran(self) -> torch_profile:
        if self._profiled is None:
            raise RuntimeError("profile: read inside its with, accepted: after it has ended.")
        return self._profiled

    @cached_property
    def works(self) -> dict[str, Work]:
        """Of all calls of a range, by its name."""
        found: dict[str, Work] = defaultdict(lambda: Work(0, 0, 0))
        for name, formula, amount in self._pending:
            one, more = found[name], formula(int(amount))
            found[name] = Work(one.read + more.read, one.written + more.written, one.exponentials + more.exponentials)
        return found

    @cached_property
    def lines(self) -> list[Line]:
        """The limits beside them are measured at the first call, which takes seconds on a CPU."""
        return lines_of(self.step, self.works, self.device)

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


@contextmanager
def profile() -> Iterator[Profile]:
    """Profiles the training step inside.

        with tokenrl.profile() as p:
            training_step()
        print(p.table())
        p.trace("step.json")

    Each op of tokenrl, forward and backward, has a line: calls, launches (kernels on a GPU, operations on a CPU), time
    of the host and of the device, bytes, flops and exponentials by a model, the rates that these come to beside what
    this machine does at best (measured when a table is asked for), peak memory and how often the host waits. Ops inside
    of ops, and the matrix products between them, are listed below theirs; all else is one line. Run the step once
    before: a first call compiles and warms up. Profiling itself costs the host microseconds per operation of torch.

    The reference's backward is autograd's own, and lies in the last line; so does what torch.compile has fused. Nothing
    else that uses torch.profiler may be at work.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = Profile(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch_profile(activities=activities, record_shapes=True, profile_memory=True, with_flops=True) as profiled:
        ranges.watchers.append(found.watch)
        try:
            with record_function(STEP):
                yield found
            sync(device)  # what is still at work belongs to the step
        finally:
            ranges.watchers.remove(found.watch)
    found.ended(profiled)
