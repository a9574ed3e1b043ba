"""How a plan shows numbers and text."""

from rich.console import Console
from rich.padding import Padding
from rich.text import Text


def wrapped(console: Console, text: str) -> None:
    console.print(Padding(Text(text), (0, 0, 0, 0)))


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f}"
