"""`tokenrl plan`."""

from pathlib import Path
from typing import Annotated

from typer import Option as option


def gpu_names(incomplete: str) -> list[str]:
    """For shell completion."""
    from ..instruments.plan.machines import names

    return [name for name in names() if name.startswith(incomplete)]


def number_names(incomplete: str) -> list[str]:
    """For shell completion."""
    from ..instruments.plan.machines import NUMBERS

    return [f"{name}=" for name in NUMBERS if name.startswith(incomplete)]


def plan(
    tokens: Annotated[int, option(min=1, help="Of a call; those that a mask leaves out cost linear_* nothing.")],
    hidden: Annotated[int | None, option(min=1, help="Width of the hidden states.")] = None,
    vocab: Annotated[int | None, option(min=1, help="Rows of the head's weight.")] = None,
    dtype: Annotated[str | None, option(help="bf16, fp16 or fp32.")] = None,
    gpu: Annotated[
        str | None,
        option(help="Of the table, as h200; cpu or cuda: this machine, measured.", autocompletion=gpu_names),
    ] = None,
    model: Annotated[Path | None, option(help="A model's config.json, or its folder: hidden, vocab, dtype.")] = None,
    tp: Annotated[
        int | None, option(min=1, help="Ranks of the vocabulary, beside one; 8 on a GPU of the table.")
    ] = None,
    cp: Annotated[int | None, option(min=1, help="Ranks of a micro-batch's tokens.")] = None,
    dp: Annotated[int | None, option(min=1, help="Ranks of a batch's micro-batches.")] = None,
    sequences: Annotated[int, option(min=1, help="Of a rank's optimizer step.")] = 16,
    machine: Annotated[
        list[str] | None,
        option(
            help="NAME=NUMBER in place of the machine's, as flops=6e14, link=3.5e11 (bytes/s), latency=2e-5 (s).",
            autocompletion=number_names,
        ),
    ] = None,
    budget: Annotated[str | None, option(help="memory_budget of the linear ops, as '2 GB'.")] = None,
    json: Annotated[bool, option("--json", help="As JSON.")] = False,
) -> None:
    """Time and memory of the loss head, each way there is to compute it, and which op to use; with --tp, --cp or --dp
    what its ranks send each other, and up to how many of them a vocabulary-parallel head pays.

    Example: tokenrl plan --tokens 32768 --hidden 5120 --vocab 151936 --dtype bf16 --gpu h200 --tp 8 --dp 16
    """
    from rich.console import Console

    from ..bench.committed import committed
    from ..instruments.output import print_json
    from ..instruments.plan import report
    from ..instruments.plan.machines import HERE, check_gpu, numbers_of
    from ..instruments.plan.model_config import read, shape_of
    from ..instruments.plan.world import World
    from ..instruments.record import bytes_of

    head = None if model is None else read(model)
    shape, name = shape_of(tokens, hidden, vocab, dtype, head), check_gpu(gpu)
    limit = None if budget is None else bytes_of(budget, "budget")
    asked = any(ranks is not None for ranks in (tp, cp, dp))
    world = World(tp or (1 if asked or name in HERE else 8), cp or 1, dp or 1, sequences)
    found = report.plan(shape, name, world, limit, committed(shape, name), numbers_of(machine or []), asked)
    found["tied"] = head is not None and head.tied
    if json:
        print_json(found)
    else:
        report.print_plan(found, Console())
