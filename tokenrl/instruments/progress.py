"""A progress bar for what takes longer than two seconds."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], named: Callable[[T], str] = str) -> Iterator[T]:
    """The items, a bar on the terminal's standard error naming the one that is at work; nothing where that is none."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    rest, console = list(items), Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(rest))
        for item in rest:
            bar.update(task, description=named(item)[:40])
            yield item
            bar.advance(task)
