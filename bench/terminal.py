"""What was measured as tables of at most 80 columns: a table of its own for each case, and for each head of a plan."""

from collections.abc import Iterable, Iterator
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from .report import (
    MISSING,
    REMARKS,
    cliffs_table,
    distill_table,
    fused_table,
    is_linear,
    megabytes,
    notes,
    number,
    op_name,
    over_gemms,
    overhead_table,
    plan_table,
    times,
    trl_table,
)

Rows = tuple[list[str], list[list[str]]]  # head and rows of a table


def pair(line: dict, key: str) -> str:
    """Forward / forward and backward."""
    return close(number(line[f"{way}_{key}"]) for way in ("forward", "both"))


def close(cells: Iterable[str]) -> str:
    return "/".join(cells)


def case_table(lines: list[dict]) -> Rows:
    """A row for each backend of a case, the competitors included; `ours is`: how many times as fast as it."""
    ours = next((line for line in lines if line["ours"]), None)
    head = ["", "fwd/both ms", "% of limit", "peak MB", "errors", "ours is"]
    rows = [
        [
            line["backend"], pair(line, "ms"), pair(line, "percent"), megabytes(line["both_peak_bytes"]),
            close(number(line[f"{what}_error_ratio"], 2) for what in ("value", "gradient")),
            MISSING if ours is None else times(ours["versus"].get(line["backend"])).replace(" ", ""),
        ]
        for line in lines
    ]  # fmt: skip
    if is_linear(lines[0]):
        head[2], column = "x bare GEMMs", [over_gemms(line).replace(" ", "") for line in lines]
        rows = [[*row[:2], cell, *row[3:]] for row, cell in zip(rows, column, strict=True)]
    return head, rows


def counts(lines: list[dict]) -> Iterator[str]:
    """What is counted of our backends."""
    for line in lines:
        if line["ours"] and "launches" in line:
            moved = number(line["model_bytes_per_token"]), number(line["time_as_bytes_per_token"])
            yield (
                f"{line['backend']}: {moved[0]} bytes a token by the model, {moved[1]} could be copied in the time; "
                f"launches or ops {_counted(line['launches'])}, host syncs {_counted(line['host_syncs'])}"
            )


def _counted(x: int | None) -> str:
    return MISSING if x is None else str(x)


def by_head(found: Rows) -> Iterator[tuple[str, Rows]]:
    """A table for each value of the first column, which becomes its title."""
    head, rows = found
    for title, group in groupby(rows, key=lambda row: row[0]):
        yield f"{head[0]}: {title}", (head[1:], [row[1:] for row in group])


def by_reason(missing: list[dict]) -> dict[tuple[str, str], list[str]]:
    """(competitor, reason) -> the cases."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in missing:
        found.setdefault((one["competitor"], one["reason"]), []).append(one["case"])
    return found


def tables(report: dict) -> Iterator[tuple[str, Rows, list[str]]]:
    """(title, table, lines below it) of everything that was measured."""
    yield "Host side of a call, in additions of a 64 x 8 tensor", overhead_table(report), []
    yield "Beside a plain neighbour, one thread", cliffs_table(report), []
    yield "Fused gates, forward and backward, one thread", fused_table(report), []
    yield "The loss step of TRL's GRPOTrainer", trl_table(report), []
    for title, found in (*by_head(distill_table(report)), *by_head(plan_table(report))):
        yield title, found, []
    key = lambda line: (op_name(line), str(line["shape"]), line["dtype"])  # noqa: E731
    for name, group in groupby(report["lines"], key=key):
        lines = list(group)
        yield " ".join(name), case_table(lines), list(counts(lines))


def show(report: dict, console: Console) -> None:
    wrapped(console, report["machine"])
    for title, (head, rows), below in tables(report):
        if not rows:
            continue
        made = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, name in enumerate(head):
            made.add_column(name, justify="left" if place == 0 else "right", no_wrap=place > 0)
        for row in rows:
            made.add_row(*map(escape, row))
        console.print(made, highlight=False)
        for text in below:
            wrapped(console, text)
    if report["missing"]:
        console.print(f"\n{REMARKS}", style="bold", highlight=False)
    for (name, reason), cases in by_reason(report["missing"]).items():
        wrapped(console, f"{name}: {reason}: {'; '.join(cases)}")
    for text in notes(report):
        wrapped(console, f"\n{text}")


def wrapped(console: Console, text: str) -> None:
    console.print(Padding(escape(text), 0), highlight=False)
