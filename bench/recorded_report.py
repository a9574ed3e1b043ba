"""`tokenrl profile`: what came of a recorded batch, as tables, as JSON, and as a section of the page."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tokenrl
from tokenrl.batch.checks import check_name
from tokenrl.errors import wrong
from tokenrl.instruments.profiler import Profile
from tokenrl.instruments.profiling.report import Row, Section
from tokenrl.instruments.profiling.tables import number, of_profile
from tokenrl.instruments.rollout_batch import RolloutBatch
from tokenrl.objectives.policy import Objective, find_objective
from tokenrl.ops.backends import BACKENDS

from .machine import keep_freed_memory
from .recorded import Beside, beside

RULE = (
    "Forward and backward of the whole batch, medians of repeats taken in turns. Each way was held to the tolerance "
    "rule of tokenrl.parity; the loss of others' log-probs is tokenrl's reference, which is plain torch."
)
HEAD = ("way", "ms", "x ours", "peak MB", "error / allowed")


@dataclass(frozen=True)
class Found:
    """profile: of the fastest of our ways; None where none is right."""

    batch: RolloutBatch
    row: Objective
    name: str
    beside: Beside
    profile: Profile | None

    @property
    def title(self) -> str:
        way = f": {self.beside.lines[0]['name']}" if self.profile else ""
        return f"{self.row.name} on {self.name}{way}"


def made(
    path: Path, objective: str | None, backend: str | None, device: str | None, repeats: int, compile: bool
) -> Found:
    """Everything is asked for by its name; ValueError for one that is not there."""
    keep_freed_memory()
    batch = tokenrl.load_batch(path)
    row = batch.objective if objective is None else find_objective(objective)
    place = chosen_device(device)
    names = [] if backend is None else [chosen_backend(backend, place, row)]
    found = beside(batch, row, place, names, compile=compile, repeats=repeats)
    profiled = None
    if found.fastest is not None:
        with tokenrl.profile(place) as profiled:
            found.fastest()
    return Found(batch, row, path.name, found, profiled)


def chosen_device(given: str | None) -> str:
    able = ["cpu", *["cuda"] * torch.cuda.is_available()]
    if given is None:
        return able[-1]
    check_name("device", given, ("cpu", "cuda"))
    if given not in able:
        raise wrong("device", given, "cpu (torch sees no GPU here)")
    return given


def chosen_backend(name: str, device: str, row: Objective) -> str:
    check_name("backend", name, BACKENDS)
    reasons = {key: b.why_not(torch.device(device)) or b.why_not_gate(row.gate.name) for key, b in BACKENDS.items()}
    if reason := reasons[name]:
        able = ", ".join(key for key, why in reasons.items() if why is None)
        raise wrong("backend", name, f"{able} ({name}: {reason})")
    return name


def described(batch: RolloutBatch) -> str:
    """Its size, in a line."""
    layout, x = batch.layout, batch.tensors[batch.leaf]
    count = f"{int(layout.valid().sum()):,} of {layout.num_tokens:,} tokens"
    kind = "packed" if layout.width is None else "padded"
    head = f"{batch.leaf} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    weight = f", weight {list(batch.tensors['weight'].shape)}" if batch.leaf == "hidden" else ""
    return f"{count} in {layout.num_sequences:,} {kind} sequences; {head}{weight}"


def cells(line: dict[str, Any]) -> list[str]:
    times = "-" if line.get("times_ours") is None else f"{line['times_ours']:.2f}"
    share = "-" if line["error_share"] is None else f"{line['error_share']:.2f}"
    return [line["name"], number(1e3 * line["seconds"]), times, number(line["peak_bytes"] / 1e6), share]


def section(found: Found) -> Section:
    """Of the page."""
    rows = [Row(cells(line), ours=line["ours"]) for line in found.beside.lines]
    notes = [f"{name}: {reason}" for name, reason in found.beside.remarks]
    text = f"{described(found.batch)}. {RULE}"
    return Section("beside", "Beside others", text, head=HEAD, rows=rows, notes=notes)


def as_dict(found: Found) -> dict[str, Any]:
    profile = found.profile
    ratios = profile.ratios if profile else None
    return {
        "batch": {"file": found.name, "objective": found.row.name, "size": described(found.batch)},
        "beside": found.beside.lines, "not_timed": dict(found.beside.remarks), "wrong": found.beside.wrong,
        "profile": profile.as_dict() if profile else None, "ratios": asdict(ratios) if ratios else None,
    }  # fmt: skip


def show(found: Found, console: Console) -> None:
    console.print(escape(f"{found.title}\n{described(found.batch)}"), highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for name in HEAD:
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for line in found.beside.lines:
        table.add_row(*map(escape, cells(line)))
    if found.beside.lines:
        console.print(table, highlight=False)
    for name, reason in found.beside.remarks:
        console.print(escape(f"{name}: {reason}"), highlight=False)
    if found.profile:
        console.print("", *of_profile(found.profile), sep="\n", highlight=False)
