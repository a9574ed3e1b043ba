"""`tokenrl doctor`."""

from typing import Annotated

from typer import Option as option


def doctor(json: Annotated[bool, option("--json", help="As JSON.")] = False) -> None:
    """Versions, each backend, whether it can run here or why not, what would give a faster one, and the trainers.

    Example: tokenrl doctor --json
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..instruments import doctor as instrument
    from ..instruments.output import print_json
    from ..integrations.hosts import trainers

    if json:
        return print_json(instrument.findings() | {"trainers": trainers()})
    console = Console()
    instrument.print_doctor(console)
    table = Table("trainer", "here", "held to", "for", "", box=box.SIMPLE_HEAD)
    for row in trainers().values():
        table.add_row(*map(escape, row.values()))
    if table.row_count:
        console.print(table, highlight=False)
