"""The `tokenrl` command: `tokenrl demo`, `tokenrl doctor` and `tokenrl objectives`."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import typer

NEEDED = {"demo": ("transformers", "safetensors", "matplotlib"), "any command": ("typer", "rich")}


def require(command: str) -> None:
    """Exits with what to install when a package that a command needs is missing."""
    missing = [package for package in NEEDED[command] if importlib.util.find_spec(package) is None]
    if missing:
        sys.exit(f"tokenrl: {command} needs {', '.join(missing)}, not installed here: pip install tokenrl[demo]")


def main() -> None:
    """Entry point of the `tokenrl` command."""
    require("any command")
    application()()


def application() -> "typer.Typer":
    """The typer application."""
    import typer
    from typer import Option as option

    app = typer.Typer(name="tokenrl", help="Fused kernels for the loss head of RL post-training.", no_args_is_help=True)

    @app.command()
    def doctor() -> None:
        """Versions, and each backend: whether it can run here, or why not."""
        from rich.console import Console

        from .instruments.doctor import print_doctor

        print_doctor(Console())

    @app.command()
    def objectives(
        name: Annotated[str, typer.Argument(help="A row: its formula, parameters, source and gradient.")] = "",
    ) -> None:
        """The table of objectives, or one of its rows in full."""
        from rich.console import Console

        from .instruments.objective_tables import print_objective, print_objectives

        if not name:
            return print_objectives(Console())
        try:
            print_objective(name, Console())
        except ValueError as error:
            sys.exit(f"tokenrl: {error}")

    @app.command()
    def demo(
        out: Annotated[Path, option(help="Folder for the figure, the report and the rollouts.")] = Path("demo_out"),
        seed: Annotated[int, option(help="Decides the weights, the problems and the samples.")] = 0,
        steps: Annotated[int, option(min=1, help="Batches of rollouts per objective.")] = 40,
        prompts: Annotated[int, option(min=1, help="Problems per batch, 8 rollouts each.")] = 48,
        learning_rate: Annotated[float, option(help="Of the reinforcement, with AdamW.")] = 2e-4,
    ) -> None:
        """Trains a small language model with grpo and ctpo, times the loss head, checks every backend's gradients."""
        require("demo")
        run_demo(out, seed=seed, steps=steps, prompts=prompts, learning_rate=learning_rate)

    return app


def run_demo(out: Path, **settings: Any) -> None:
    """Runs the demo; exit code 1 when the reward did not rise with both objectives."""
    from rich.console import Console

    from .demo import Settings, run

    result = run(out, Settings(**settings), Console())
    if result.not_risen():
        moves = (f"{name} {result.trained[name].before['sampled']:.3f} -> {result.trained[name].after['sampled']:.3f}"
                 for name in result.not_risen())  # fmt: skip
        sys.exit(f"tokenrl demo: the sampled reward on held-out problems did not rise by 0.1: {', '.join(moves)}")


if __name__ == "__main__":
    main()
