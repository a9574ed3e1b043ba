"""`tokenrl parity`."""

from pathlib import Path
from typing import Annotated

from typer import Argument as argument
from typer import Exit
from typer import Option as option


def parity(
    batch: Annotated[Path | None, argument(help="A file of tokenrl.record; left out: a small one from a seed.")] = None,
    objective: Annotated[str | None, option(help="A row of `tokenrl objectives`; left out: the batch's own.")] = None,
    against: Annotated[str | None, option(help="MODULE:FUNCTION, a loss of yours in place of the backends.")] = None,
    backend: Annotated[str | None, option(help="One alone; left out: every one that can run here.")] = None,
    gate: Annotated[str | None, option(help="MODULE:CLASS, a gate of yours: its derivatives, its Triton.")] = None,
    json: Annotated[bool, option("--json", help="Print JSON.")] = False,
) -> None:
    """Value and gradient of every backend, or of a loss of yours, against the fp64 reference; 1 where they differ.

    Example: tokenrl parity batch.safetensors --objective ctpo --against my_module:my_loss
    """
    from rich.console import Console

    from ..errors import wrong
    from ..instruments.parity import gate_check, random_batch, report, shown, wording
    from ..instruments.parity.user_loss import found_by_name, user_loss
    from ..instruments.rollout_batch import load_batch

    given = {"batch": batch, "objective": objective, "against": against, "backend": backend}
    if gate and (more := [name for name, value in given.items() if value is not None]):
        raise wrong(more[0], given[more[0]], "nothing beside --gate, which is checked by itself")
    if against and backend:
        raise wrong("backend", backend, "nothing beside --against, whose loss is computed by itself")
    if gate:
        of_gate = gate_check.checked_gate(gate_check.as_gate(found_by_name("gate", gate)))
        print(wording.as_json(of_gate)) if json else shown.print_gate(of_gate, Console())
        raise Exit(0 if of_gate.held else 1)
    rollouts = random_batch() if batch is None else load_batch(batch)
    if against:
        found = report.of_loss(user_loss(found_by_name("against", against)), rollouts, objective)
    else:
        found = report.of_backends(rollouts, objective, backend)
    print(wording.as_json(found)) if json else shown.print_report(found, Console())
    raise Exit(0 if found.held else 1)
