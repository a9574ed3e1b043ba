"""`tokenrl profile`."""

from pathlib import Path
from typing import Annotated

from typer import Argument as argument
from typer import Exit
from typer import Option as option


def profile(
    batch: Annotated[Path, argument(help="A file of tokenrl.record.")],
    objective: Annotated[str | None, option(help="A row of `tokenrl objectives`; left out: the batch's own.")] = None,
    backend: Annotated[str | None, option(help="One alone; left out: every one that can run here.")] = None,
    device: Annotated[str | None, option(help="cpu or cuda; cuda where there is one.")] = None,
    repeats: Annotated[int, option(min=1, help="Samples of each way, taken in turns; at least 3.")] = 7,
    no_compile: Annotated[bool, option("--no-compile", help="Leave torch.compile out.")] = False,
    trace: Annotated[Path | None, option(help="File for a Chrome trace, for Perfetto.")] = None,
    html: Annotated[Path | None, option(help="File for a page with table, roofline, timeline, memory.")] = None,
    json: Annotated[bool, option("--json", help="Print JSON.")] = False,
) -> None:
    """The loss head of a recorded batch, forward and backward: op by op, and beside PyTorch, TRL and Liger.

    A way that is not within the tolerance rule is not timed; 1 where that is one of tokenrl's.

    Example: tokenrl profile batch.safetensors --objective ctpo --html report.html
    """
    from rich.console import Console

    from ..bench import recorded_report
    from ..instruments.output import print_json

    found = recorded_report.made(batch, objective, backend, device, repeats, not no_compile)
    if trace is not None and found.profile is not None:
        found.profile.trace(trace)
    if html is not None and found.profile is not None:
        found.profile.html(html, found.title, [recorded_report.section(found)])
    if json:
        print_json(recorded_report.as_dict(found))
    else:
        recorded_report.show(found, Console())
    if found.beside.wrong:
        raise Exit(1)
