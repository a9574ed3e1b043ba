"""`tokenrl objectives` on a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from . import FAMILIES
from .entry import Entry, shown


def print_entries(entries: Sequence[Entry], console: Console) -> None:
    """By family, each row by its name and what it is made of; below, its aggregation or reference, and its source."""
    width, family = max(len(entry.name) for entry in entries), ""
    for entry in entries:
        if entry.family != family:
            family = entry.family
            console.print(f"\n[bold]{family}[/bold]: {FAMILIES[family]}", highlight=False)
        line = Text(f"{entry.name:<{width}}  {entry.summary}")
        console.print(line, highlight=False, no_wrap=True, overflow="crop")
        rest = Text(f"{entry.rest}; {entry.source} {entry.letters}".rstrip())
        console.print(Padding(rest, (0, 0, 0, 4)), style="dim")


def print_entry(entry: Entry, console: Console) -> None:
    """Formula, parameters, source and the gradient's flow of a row, what to feed and how to call it."""

    def section(title: str, lines: Sequence[str]) -> None:
        console.print(f"\n[bold]{title}[/bold]")
        text = "\n".join(f"  {line}" for line in lines)
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    section(entry.name, entry.formula.splitlines())
    for title, text in entry.parts.items():
        section(title, text.splitlines())
    section("parameters", [f"{key} = {shown(value)}" for key, value in entry.parameters.items()] or ["none"])
    section("gradient", [entry.gradient])
    section(
        "source", [entry.source, *(f"[{x}] {w}" for x, w in zip(entry.certainty, entry.certainty_words, strict=True))]
    )
    section("fed with", entry.feed)
    section("in Python", entry.example.splitlines())
    section("runs on", [", ".join(entry.backends) or "torch, on any device"])
