"""A report on the terminal."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .comparison import Comparison, Token
from .gate_check import GateReport
from .report import Report
from .wording import mistake_words

WIDEST = 18  # of names, so that a line has 80 columns


def print_report(report: Report, console: Console) -> None:
    """The errors, the worst tokens, those left out, and what cannot run."""
    tokens = f"{report.valid:,} of {report.cells:,} tokens valid in {report.sequences:,} sequences"
    by = ", ".join(report.leaves)
    console.print(f"{report.objective}: {tokens}; value, and gradient by {by}", highlight=False)
    table = _table(("", "on", "in", "of"), ("error", "allowed"), ("",))
    for comparison in report.comparisons:
        _add(table, comparison)
    worst = [(one.way, one.worst) for one in report.comparisons if one.worst is not None]
    edges = [("at a clip edge", token) for token in report.edges]
    for part in (table, *_tokens("worst token of", worst), *_tokens("left out", edges)):
        console.print(part, highlight=False)
    for comparison in report.comparisons:
        if comparison.reason is not None:
            console.print(f"{comparison.way} cannot run: {comparison.reason}", highlight=False, markup=False)
    for line in mistake_words(report):
        console.print(line, highlight=False, markup=False, style="bold")
    left_out = {one.dtype: one.undecided for one in report.comparisons if one.undecided}
    if left_out:
        counts = ", ".join(f"{count:,} in {dtype}" for dtype, count in left_out.items())
        console.print(f"tokens whose gradient rounding decides: {counts}", highlight=False)


def print_gate(report: GateReport, console: Console) -> None:
    """The checks of a gate, and the tokens where one fails."""
    console.print(f"gate {report.gate}: {report.points:,} tokens, {report.at_kinks} at a kink", highlight=False)
    table = _table(("",), ("error", "allowed"), ("",))
    for error in report.errors:
        table.add_row(escape(error.of), f"{error.error:.1e}", f"{error.allowed:.1e}", _verdict(error.held))
    console.print(table, highlight=False)
    failed = [error for error in report.errors if not error.held and error.at is not None]
    if failed:
        at = _table(("most at",), ("s", "x", "logp", "A", "t"))
        for error in failed:
            at.add_row(escape(error.of[:WIDEST]), *(f"{value:.4g}" for value in (error.at or {}).values()))
        console.print(at, highlight=False)
    if report.no_triton is not None:
        console.print(f"its Triton function was not run: {report.no_triton}", highlight=False, markup=False)


def _verdict(held: bool) -> str:
    return "holds" if held else "[bold red]differs[/bold red]"


def _table(texts: Sequence[str], numbers: Sequence[str], more: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in more:
        table.add_column(name, no_wrap=True)
    return table


def _add(table: Table, comparison: Comparison) -> None:
    where = (escape(comparison.way[:WIDEST]), comparison.device, comparison.dtype)
    for error in comparison.errors:
        table.add_row(*where, error.of, f"{error.error:.1e}", f"{error.allowed:.1e}", _verdict(error.held))
        where = ("", "", "")
    for name in comparison.not_compared:
        table.add_row(*where, name, "-", "-", "left out")


def _tokens(title: str, named: Sequence[tuple[str, Token]]) -> Iterator[Table]:
    if not named:
        return
    table = _table((title,), ("sequence", "token", "ratio", "A", "to edge"))
    for name, token in named:
        edge = "-" if token.to_edge is None else f"{token.to_edge:+.3g}"
        where = (str(token.sequence), f"{token.position} of {token.length}")
        table.add_row(escape(name[:WIDEST]), *where, f"{token.ratio:.5g}", f"{token.advantage:+.3g}", edge)
    yield table
