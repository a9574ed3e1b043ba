"""`tokenrl objectives`."""

from typing import Annotated

from typer import Argument as argument
from typer import Option as option


def objectives(
    name: Annotated[str, argument(help="A row: its formula, parameters, source, gradient, and a call.")] = "",
    family: Annotated[str, option("--family", help="Rows of a page of the documentation: clip, prefix, ...")] = "",
    paper: Annotated[str, option("--paper", help="Rows of a paper, by its arXiv number.")] = "",
    search: Annotated[str, option("--search", help="Rows with this in their name, formula or source.")] = "",
    json: Annotated[bool, option("--json", help="As JSON.")] = False,
) -> None:
    """The tables of objectives, or one row in full.

    Example: tokenrl objectives --paper 2605.07331
    """
    from rich.console import Console

    from ..instruments.catalogue import find_entry, selected
    from ..instruments.catalogue.printed import print_entries, print_entry
    from ..instruments.output import print_json

    found = [find_entry(name)] if name else selected(family, paper, search)
    if json:
        print_json(found[0].as_json() if name else [entry.as_json() for entry in found])
    elif name:
        print_entry(found[0], Console())
    else:
        print_entries(found, Console())
