"""A progress bar for what takes longer than two seconds."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_at_work: list[bool] = []  # of the bars that are shown: one inside another is silent


def tracked(items: Iterable[T], named: Callable[[T], str] = str) -> Iterator[T]:
    """The items, a bar on the terminal's standard error naming the one that is at work; nothing where that is none."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    rest, console = list(items), Console(stderr=True)
    if _at_work or not console.is_terminal:
        yield from rest
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(rest))
        _at_work.append(True)
        try:
            for item in rest:
                bar.update(task, description=named(item)[:40])
                yield item
                bar.advance(task)
        finally:
            _at_work.pop()
