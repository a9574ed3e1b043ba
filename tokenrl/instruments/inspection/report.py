"""The tables of `tokenrl inspect`, which fit 80 columns."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .numbers import CLIPS, QUANTILES

LONGEST = 28  # of a name in a table; the middle of a longer one is left out


def print_inspected(found: Mapping[str, Any], console: Console) -> None:
    """The batch, its tensors, lengths and holes, ratios by position, and what each objective clips."""
    objective = found["objective"]
    changed = ", ".join(f"{name}={value}" for name, value in objective["parameters"].items())
    _wrapped(console, f"objective {objective['name']}{f' with {changed}' if changed else ''}; {_counted(found)}")
    for what in ("source", "settings"):
        if found[what]:
            _wrapped(console, f"{what}: " + ", ".join(f"{name} {value}" for name, value in found[what].items()))
    _tensors(found, console)
    _lengths(found, console)
    if found["tokens"]:  # of none there are no ratios and no clips
        _ratios(found, console)
        _objectives(found["objectives"], console)


def _wrapped(console: Console, text: str) -> None:
    """Of any length: words, and names that are longer than a line, are broken at its end. A file's words may hold what
    a terminal obeys: it is shown as Python spells it."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    console.print(Padding(Text(shown, overflow="fold"), (0, 0, 0, 0)))


def _counted(found: Mapping[str, Any]) -> str:
    empty = f" ({found['empty_sequences']:,} without a token)" if found["empty_sequences"] else ""
    valid = f"{found['tokens']:,} of {found['cells']:,} tokens valid"
    return f"{found['layout']}, {found['sequences']:,} sequences{empty}, {valid}"


def short(name: str) -> str:
    half = LONGEST // 2 - 1
    return name if len(name) <= LONGEST else f"{name[:half]}..{name[-half:]}"


def table(names: Sequence[str], texts: int = 1) -> Table:
    """Of columns that never wrap, numbers on the right behind so many of text."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for at, name in enumerate(names):
        made.add_column(name, no_wrap=True, justify="left" if at < texts else "right")
    return made


def _tensors(found: Mapping[str, Any], console: Console) -> None:
    made = table(("tensor", "shape", "dtype", "bytes"), 3)
    for tensor in found["tensors"]:
        made.add_row(
            escape(short(tensor["name"])), escape(str(tensor["shape"])), tensor["dtype"], size(tensor["bytes"])
        )
    console.print(made, highlight=False)
    for name, count in found["not_finite"].items():
        _wrapped(console, f"{name}: {count:,} valid tokens are NaN or infinite")


def _lengths(found: Mapping[str, Any], console: Console) -> None:
    lengths, holes = found["lengths"], found["holes"]
    words = ", ".join(f"{name} {number(value)}" for name, value in lengths.items())
    _wrapped(console, f"valid tokens of a sequence: {words}")
    inside = f"{holes['tokens']:,} holes in {holes['sequences']:,} sequences"
    outside = f"{holes['before']:,} before the first token, {holes['after']:,} after the last"
    _wrapped(console, f"the mask leaves out: {inside}, {outside}")


def _ratios(found: Mapping[str, Any], console: Console) -> None:
    console.print()
    _wrapped(console, f"ratio of a token, new / old, by its position among valid ones; ess {number(found['ess'], 4)}")
    console.print(_by_position(found["ratio_quantiles"]), highlight=False)
    if found["own_ratio_quantiles"]:
        _wrapped(console, f"ratio that {found['objective']['name']} clips")
        console.print(_by_position(found["own_ratio_quantiles"]), highlight=False)
    if found["kl"]:
        made = table(("mean of the estimates of KL", "k1", "k2", "k3"))
        for pair, values in found["kl"].items():
            made.add_row(escape(pair), *map(number, values.values()))
        console.print(made, highlight=False)


def _by_position(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = table(("position", "tokens", *(f"{level:.0%}" for level in QUANTILES)))
    for row in rows:
        place = f"{row['from']:,}" if row["from"] == row["to"] else f"{row['from']:,} to {row['to']:,}"
        made.add_row(place, f"{row['tokens']:,}", *map(number, row["quantiles"]))
    return made


def _objectives(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    made = table(("tokens clipped, %", "any", "low", "high", "dual", "ratio", "ess"))
    for row in rows:
        if clips(row):
            shares = (percent(row[name]) for name in ("clipped", *CLIPS))
            made.add_row(escape(short(row["name"])), *shares, number(row["ratio_mean"], 4), number(row["ess"], 4))
    if made.rows:
        console.print(made, highlight=False)
    idle = [short(row["name"]) for row in rows if "reason" not in row and not clips(row)]
    if idle:
        _wrapped(console, f"no token is clipped by {', '.join(idle)}")
    for row in rows:
        if "reason" in row:
            _wrapped(console, f"{short(row['name'])} cannot run: {row['reason']}")


def clips(row: Mapping[str, Any]) -> bool:
    return "reason" not in row and any(row[name] > 0 for name in CLIPS)


def size(count: int) -> str:
    steps = [(unit, count / 1000**k) for k, unit in enumerate(("B", "KB", "MB", "GB"))]
    unit, shown = next((step for step in steps if step[1] < 1000), steps[-1])
    return f"{number(shown)} {unit}"


def number(x: float | None, digits: int = 3) -> str:
    """In few characters."""
    if x is None or math.isnan(x):
        return "-"
    return f"{x:,.0f}" if 1e3 <= abs(x) < 1e7 else f"{x:.{digits}g}"


def percent(share: float | None) -> str:
    return number(None if share is None else 100 * share)
