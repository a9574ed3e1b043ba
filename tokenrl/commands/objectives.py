"""`tokenrl objectives`."""

from typing import Annotated

from typer import Argument as argument


def objectives(
    name: Annotated[str, argument(help="A row: its formula, parameters, source and gradient.")] = "",
) -> None:
    """The table of objectives, or one of its rows in full.

    Example: tokenrl objectives ctpo
    """
    from rich.console import Console

    from ..instruments.objective_tables import print_objective, print_objectives

    if name:
        print_objective(name, Console())
    else:
        print_objectives(Console())
