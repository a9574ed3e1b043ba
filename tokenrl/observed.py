"""Calls of public functions that instruments may watch (tokenrl/instruments/record.py)."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from torch.compiler import is_compiling

Params = ParamSpec("Params")
Result = TypeVar("Result")
Observer = Callable[[str, Mapping[str, Any], Any], None]  # the function's name, its arguments by name, its result

_observers: list[Observer] = []


def observed(function: Callable[Params, Result]) -> Callable[Params, Result]:
    """The function; whoever observes sees each call once it has returned."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        result = function(*args, **kwargs)
        # A trace has no numbers to observe, and may not depend on who does.
        if not is_compiling() and _observers:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for observe in _observers:
                observe(function.__name__, bound.arguments, result)
        return result

    return call


@contextmanager
def observing(observe: Observer) -> Iterator[None]:
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)
