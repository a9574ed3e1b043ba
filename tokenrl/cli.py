"""The `tokenrl` command: tokenrl/commands/ has its commands."""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

COMMANDS = ("bench", "demo", "doctor", "inspect", "objectives", "parity", "plan", "profile")  # in the order of --help
ALWAYS = ("typer", "rich")
NEEDED = {  # beside those, by command
    "demo": ("transformers", "safetensors", "matplotlib"),
    "inspect": ("safetensors",),
    "profile": ("safetensors",),
}


def require(command: str, packages: tuple[str, ...]) -> None:
    """Exits with what to install when a package that a command needs is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        sys.exit(f"tokenrl: {command} needs {', '.join(missing)}, not installed here: pip install tokenrl[demo]")


def main() -> None:
    """Entry point of the `tokenrl` command."""
    require("any command", ALWAYS)
    application()()


def application() -> "typer.Typer":
    """The typer application."""
    import typer

    app = typer.Typer(name="tokenrl", help="Fused kernels for the loss head of RL post-training.", no_args_is_help=True)
    for name in COMMANDS:
        module = importlib.import_module(f".commands.{name}", __package__)
        app.command(name)(_checked(name, getattr(module, name)))
    return app


def _checked(name: str, command: Callable[..., None]) -> Callable[..., None]:
    """The command; exits by one line where a package is missing or an argument is wrong."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        require(name, NEEDED.get(name, ()))
        try:
            command(*args, **kwargs)
        except (ValueError, OSError) as error:
            sys.exit(f"tokenrl {name}: {error}")

    return run


if __name__ == "__main__":
    main()
