"""A profile as tables of 80 columns. A line has two rows: the numbers of the first are over those of the second."""

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from ..machine import machine_words
from .lines import Line

if TYPE_CHECKING:
    from ..profiler import Profile

WIDTH = 80
OTHERS = 5  # operations that are not ours, of those that took longest
HEAD = (
    ("op", "shape, dtype, backend"), ("calls", "launches"), ("host ms", "device ms"), ("GB/s", "TFLOP/s"),
    ("% of", "limit"), ("peak MB", "syncs"),
)  # fmt: skip


def text(parts: Iterable[RenderableType], width: int = WIDTH) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(Group(*parts), highlight=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def number(x: float | None) -> str:
    """Of three digits, or as many as three decimals show."""
    if x is None:
        return "-"
    decimals = sum(abs(x) < bound for bound in (100, 10, 1))
    return "0" if x == 0 else f"{x:,.{decimals}f}"


def scaled(x: float | None, by: float) -> float | None:
    return None if x is None else x * by


def dimmed(shape: Sequence[int], dtype: str, backend: str) -> str:
    return " ".join(filter(None, ("x".join(map(str, shape)), dtype, backend)))


def cells(line: Line) -> tuple[tuple[str, str], ...]:
    """The two rows of a line."""
    indent = "  " * line.level
    share = "-" if line.share is None else f"{100 * line.share:.0f}%"
    return (
        (indent + line.what, indent + dimmed(line.shape, line.dtype, line.backend)),
        (f"{line.calls}", f"{line.launches}"),
        (number(1e3 * line.host), number(1e3 * line.device if line.device else None)),
        (number(scaled(line.rate(line.bytes), 1e-9)), number(scaled(line.rate(line.flops), 1e-12))),
        (share, line.limit or ""),
        (number(scaled(line.peak, 1e-6)), f"{line.syncs}"),
    )  # fmt: skip


def of_lines(lines: Iterable[Line]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for above, below in HEAD:
        table.add_column(f"{above}\n{below}", justify="left" if above == "op" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(escape("\n".join(pair)) for pair in cells(line)))
    return table


def of_kernels(attributes: Sequence[dict[str, Any]]) -> Table:
    table = Table("kernel", "threads", "registers", "shared B", "local B", "blocks per SM", box=box.SIMPLE_HEAD)
    for row in attributes:
        names = ("name", "threads", "registers", "shared_bytes", "local_bytes", "blocks_per_multiprocessor")
        table.add_row(*(escape(str(row[name])) for name in names))
    return table


def summary(profile: "Profile") -> str:
    step = profile.step
    busy = f", {1e3 * step.busy:,.2f} ms of them on the device" if profile.device == "cuda" else ""
    waits = "host syncs" if profile.device == "cuda" else "numbers read by the host"
    return (
        f"the step took {1e3 * step.wall:,.2f} ms{busy}; peak {step.total.peak / 1e6:,.1f} MB beyond its beginning; "
        f"{step.total.syncs} {waits}"
    )


def of_profile(profile: "Profile") -> list[RenderableType]:
    others = profile.step.others.most_common(OTHERS)
    slowest = ", ".join(f"{escape(name)} {1e3 * taken:.3g} ms" for name, taken in others)
    found: list[RenderableType] = [escape(machine_words(profile.device)), "", escape(summary(profile))]
    found += [of_lines(profile.lines), f"of all else most in {slowest}"]
    return [*found, "", of_kernels(profile.kernels)] if profile.kernels else found
