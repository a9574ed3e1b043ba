"""`tokenrl plan`."""

from pathlib import Path
from typing import Annotated

from typer import Option as option


def gpu_names(incomplete: str) -> list[str]:
    """For shell completion."""
    from ..instruments.plan.machines import names

    return [name for name in names() if name.startswith(incomplete)]


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
    shards: Annotated[
        int | None, option(min=1, help="Of the vocabulary, beside none; 8 on a GPU of the table.")
    ] = None,
    budget: Annotated[str | None, option(help="memory_budget of the linear ops, as '2 GB'.")] = None,
    json: Annotated[bool, option("--json", help="As JSON.")] = False,
) -> None:
    """Time and memory of the loss head, each way there is to compute it, and which op to use.

    Example: tokenrl plan --tokens 32768 --hidden 5120 --vocab 151936 --dtype bf16 --gpu h200
    """
    from rich.console import Console

    from ..bench.committed import committed
    from ..instruments.output import print_json
    from ..instruments.plan import report
    from ..instruments.plan.machines import HERE, check_gpu
    from ..instruments.plan.model_config import read, shape_of
    from ..instruments.record import bytes_of

    head = None if model is None else read(model)
    shape, name = shape_of(tokens, hidden, vocab, dtype, head), check_gpu(gpu)
    limit = None if budget is None else bytes_of(budget, "budget")
    parts = shards or (1 if name in HERE else 8)
    found = report.plan(shape, name, parts, limit, committed(shape, name))
    found["tied"] = head is not None and head.tied
    if json:
        print_json(found)
    else:
        report.print_plan(found, Console())
