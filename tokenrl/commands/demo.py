"""`tokenrl demo`."""

import sys
from pathlib import Path
from typing import Annotated

from typer import Option as option


def demo(
    out: Annotated[Path, option(help="Folder for the figure, the report and the rollouts.")] = Path("demo_out"),
    seed: Annotated[int, option(help="Decides the weights, the problems and the samples.")] = 0,
    steps: Annotated[int, option(min=1, help="Batches of rollouts per objective.")] = 40,
    prompts: Annotated[int, option(min=1, help="Problems per batch, 8 rollouts each.")] = 48,
    learning_rate: Annotated[float, option(help="Of the reinforcement, with AdamW.")] = 2e-4,
) -> None:
    """Trains a small language model with grpo and ctpo, times the loss head, checks every backend's gradients.

    Example: tokenrl demo --seed 1 --out demo_out
    """
    from rich.console import Console

    from ..demo import Settings, run

    result = run(out, Settings(seed=seed, steps=steps, prompts=prompts, learning_rate=learning_rate), Console())
    if result.not_risen():
        moves = (f"{name} {result.trained[name].before['sampled']:.3f} -> {result.trained[name].after['sampled']:.3f}"
                 for name in result.not_risen())  # fmt: skip
        sys.exit(f"tokenrl demo: the sampled reward on held-out problems did not rise by 0.1: {', '.join(moves)}")
