"""`tokenrl doctor`."""

from typing import Annotated

from typer import Option as option


def doctor(json: Annotated[bool, option("--json", help="As JSON.")] = False) -> None:
    """Versions, each backend, whether it can run here or why not, and what would give a faster one.

    Example: tokenrl doctor --json
    """
    from rich.console import Console

    from ..instruments import doctor as instrument
    from ..instruments.output import print_json

    if json:
        print_json(instrument.findings())
    else:
        instrument.print_doctor(Console())
