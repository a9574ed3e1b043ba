"""The table of objectives on a terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import describe
from .objectives import OBJECTIVES, objective


def print_objectives(console: Console) -> None:
    """One line per row."""
    table = Table("name", "statistic", "flow", "gate", "aggregation", "source", "", box=box.SIMPLE_HEAD)
    for row in OBJECTIVES.values():
        gate = row.gate.name if row.form is None else f"{row.gate.name} in {type(row.form).__name__}"
        cells = (row.name, row.statistic, row.flow, gate, row.aggregation, row.source, describe.certainty(row))
        table.add_row(*map(escape, cells))
    console.print(table, highlight=False)


def print_objective(name: str, console: Console) -> None:
    """Formula, parameters, source and the gradient's flow of a row."""
    row = objective(name)

    def section(title: str, text: str) -> None:
        console.print(f"\n[bold]{title}[/bold]")
        console.print(
            "\n".join(f"  {line}" for line in text.splitlines()), highlight=False, markup=False, soft_wrap=True
        )

    section(row.name, describe.formula(row))
    for title, part in row.parts.items():
        section(f"{title} {part.name if title == 'gate' else type(part).__name__}", describe.text_of(part))
    values = describe.parameters(row).items()
    section("parameters", "\n".join(f"{key} = {describe.shown(value)}" for key, value in values) or "none")
    section("gradient", f"flow {row.flow!r}: {describe.FLOWS[row.flow]}")
    section("source", "\n".join([row.source, *describe.certainty_of(row)]))
    section("runs on", ", ".join(describe.kernels(row)))
