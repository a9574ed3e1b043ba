"""A plan as a table, and as JSON."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import world as worlds
from .machines import changed, machine_of
from .model import Machine, Shape, Way
from .model_config import LONG
from .shown import gigabytes, milliseconds, wrapped
from .ways import ways
from .world import World
from .world_report import print_world

SPARE = 0.9  # of a GPU's memory, which the model and its activations must share
ALIKE = 1.1  # of ways whose times differ by less the smallest is taken
Measured = Mapping[str, Mapping[str, Any]]


def described(way: Way, machine: Machine, shape: Shape, measured: Measured) -> dict[str, Any]:
    """A row of the table: seconds, bytes, and what was measured of the same shape."""
    gemms = sum(machine.seconds(step) for step in way.both if step.gemm)
    forward, both = machine.times(way)
    return {
        "way": way.name, "tokens": shape.tokens, "shards": shape.shards,
        "forward_seconds": forward, "both_seconds": both,
        "gemm_share": gemms / both, "flops": sum(step.flops for step in way.both),
        "bytes": sum(step.work.bytes for step in way.both), "launches": way.launches[1],
        "forward_peak_bytes": way.peaks[0], "both_peak_bytes": way.peaks[1],
        "fits": machine.memory is None or way.peaks[1] + shape.inputs <= SPARE * machine.memory,
        "measured": measured.get(way.name),
    }  # fmt: skip


def plan(
    batch: Shape, gpu: str, world: World, budget: int | None, measured: Measured,
    numbers: Mapping[str, float] | None = None, across: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """All of it, as JSON has it. measured: of the whole batch on that machine, by way: seconds, bytes, machine.
    numbers: of the machine, in place of its own. across: with what the ranks of the world send each other."""
    machine = changed(machine_of(gpu, batch), numbers or {})
    own = world.shape(batch)
    rows = [
        described(way, machine, one, measured if one == batch else {})
        for one in dict.fromkeys((batch, own)) for way in ways(one, machine.device, budget)
    ]  # fmt: skip
    return {
        "tokens": batch.tokens, "hidden": batch.hidden, "vocab": batch.vocab, "dtype": LONG[str(batch.dtype)[6:]],
        "input_bytes": batch.inputs, "machine": machine.name, "source": machine.source, "memory_bytes": machine.memory,
        "gemm_flops_per_second": dict(machine.gemms), "copy_bytes_per_second": machine.limits.copy,
        "ways": rows, "use": chosen(rows), "world": worlds.described(batch, world, machine, budget) if across else None,
    }  # fmt: skip


def chosen(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The smallest of those that fit and are about as fast as the fastest; without shards, if it fits so."""
    fitting = [row for row in rows if row["fits"]]
    alone = [row for row in fitting if row["shards"] == 1] or fitting
    if not alone:
        return {"way": None, "why": "none fits into the memory: take fewer tokens at a time, or more shards"}
    fastest = min(row["both_seconds"] for row in alone)
    best = min((row for row in alone if row["both_seconds"] <= ALIKE * fastest), key=lambda row: row["both_peak_bytes"])
    plain = next(row for row in rows if row["way"] == "eager" and row["shards"] == best["shards"])
    why = [
        f"{plain['both_seconds'] / best['both_seconds']:.2f}x as fast as eager",
        f"{plain['both_peak_bytes'] / best['both_peak_bytes']:.1f}x smaller",
    ]
    return {"way": best["way"], "shards": best["shards"], "why": ", ".join(why)}


def print_plan(found: Mapping[str, Any], console: Console) -> None:
    """The table, what to use, and where the numbers come from."""
    size = f"{found['tokens']:,} tokens, hidden {found['hidden']:,}, vocabulary {found['vocab']:,}, {found['dtype']}"
    console.print(f"{size}; hidden states and weight {gigabytes(found['input_bytes'])} GB", highlight=False)
    wrapped(console, f"{found['machine']}: {found['source']}")
    parts: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in found["ways"]:
        parts.setdefault((row["tokens"], row["shards"]), []).append(row)
    for (tokens, shards), rows in parts.items():
        console.print(_table(rows, _title(shards, -(-found["tokens"] // tokens))), highlight=False)
    if not all(row["fits"] for row in found["ways"]):
        wrapped(console, f"! beside hidden states and weight more than {SPARE:.0%} of the memory")
    use = found["use"]
    name = use["way"] or "none"
    if use["way"] and use["shards"] > 1:
        name += f" on each of {use['shards']} vocabulary shards"
    wrapped(console, f"use {name}: {use['why']}")
    if found.get("tied"):
        size = gigabytes(found["hidden"] * found["vocab"] * (4 if found["dtype"] == "fp32" else 2))
        wrapped(console, f"the head is the embedding: {size} GB more while the gradients of both are there")
    machines = {row["measured"]["machine"] for row in found["ways"] if row["measured"]}
    beside = f"measured: {'; '.join(sorted(machines))}" if machines else "measured: no committed result of this shape"
    wrapped(console, beside)
    if found["world"]:
        print_world(found["world"], console)


def _title(shards: int, contexts: int) -> str | None:
    """What a table's rows are of."""
    if contexts > 1:
        return f"each of {shards * contexts} ranks, tp {shards} x cp {contexts}"
    return None if shards == 1 else f"each of {shards} vocabulary shards"


def _table(rows: list[dict[str, Any]], title: str | None) -> Table:
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("way", no_wrap=True)  # numbers below never wrap either: they are short
    for name in ("fwd ms", "both ms", "GEMMs", "peak GB", "measured"):
        table.add_column(name, justify="right")
    for row in rows:
        taken = row["measured"]["seconds"] if row["measured"] else None
        table.add_row(
            escape(row["way"]), milliseconds(row["forward_seconds"]), milliseconds(row["both_seconds"]),
            f"{row['gemm_share']:.0%}", gigabytes(row["both_peak_bytes"]) + ("" if row["fits"] else " !"),
            "-" if taken is None else milliseconds(taken),
        )  # fmt: skip
    return table
