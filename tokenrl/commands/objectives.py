"""`tokenrl objectives`."""

from typing import Annotated

from typer import Argument as argument
from typer import Option as option


def objectives(
    name: Annotated[str, argument(help="A row: its formula, parameters, source and gradient.")] = "",
    json: Annotated[bool, option("--json", help="As JSON.")] = False,
) -> None:
    """The table of objectives, or one of its rows in full.

    Example: tokenrl objectives ctpo
    """
    from rich.console import Console

    from ..instruments.objective_tables import described, print_objective, print_objectives
    from ..instruments.output import print_json
    from ..objectives.policy import OBJECTIVES, find_objective

    if json:
        print_json(described(find_objective(name)) if name else [described(row) for row in OBJECTIVES.values()])
    elif name:
        print_objective(name, Console())
    else:
        print_objectives(Console())
