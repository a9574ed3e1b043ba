"""`tokenrl inspect`."""

from pathlib import Path
from typing import Annotated

from typer import Argument as argument
from typer import Option as option


def inspect(
    batch: Annotated[Path, argument(help="A file of tokenrl.record.")],
    out: Annotated[Path | None, option(help="File for a picture: .png, .svg or .pdf.")] = None,
    backend: Annotated[str | None, option(help="Of log-probs and statistics; left out: the fastest here.")] = None,
    json: Annotated[bool, option("--json", help="As JSON.")] = False,
) -> None:
    """What is in a recorded batch: shapes, lengths, holes, ratios by position, and what each objective clips.

    Example: tokenrl inspect batch.safetensors --out picture.png
    """
    from rich.console import Console

    from ..instruments.inspection import picture, report
    from ..instruments.inspection.numbers import inspected
    from ..instruments.output import print_json
    from ..instruments.rollout_batch import load_batch

    if out:
        picture.check_picture(out)
    found = inspected(load_batch(batch), backend)
    if json:
        print_json({"path": str(batch), **found.numbers})
    else:
        report.print_inspected(found.numbers, Console())
    if out:
        picture.draw(found, out, backend)
