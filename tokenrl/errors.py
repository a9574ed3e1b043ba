"""The two sentences every argument error here is built from."""

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Checked = TypeVar("Checked")

LONGEST = 160  # of what was given, in characters; what is longer is folded


def unknown(argument: str, given: object, accepted: Iterable[str]) -> ValueError:
    """An error for a name that is not in a table; it names the nearest entry that is."""
    accepted = list(accepted)
    near = difflib.get_close_matches(str(given), accepted, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{argument}: got {folded(repr(given))}, accepted: {', '.join(accepted)}.{hint}")


def wrong(argument: str, given: object, accepted: str) -> ValueError:
    """An error for a value of a known argument: what was given, what is accepted."""
    return ValueError(f"{argument}: got {folded(str(given))}, accepted: {accepted}.")


def folded(text: str) -> str:
    """In one line, the middle left out of what is long."""
    text = " ".join(text.split())
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


def described(x: object) -> str:
    """What kind of value it is, for one of a wrong type."""
    kind = f"{type(x).__module__}.{type(x).__name__}".removeprefix("builtins.")
    dtype, shape = getattr(x, "dtype", None), getattr(x, "shape", None)
    if dtype is not None and shape is not None:
        return f"a {kind} of {dtype} {list(shape)}"
    if isinstance(x, (str, int, float, type(None))):
        return f"{x!r}, a {kind}" if x is not None else "None"
    return f"a {kind}"


def renamed(whose: str, checked: Callable[..., Checked], *given: Any) -> Checked:
    """What a check makes of another model's arguments; errors name them as the caller does, "hidden" as "other_hidden"
    of the "other" one."""
    try:
        return checked(*given)
    except ValueError as error:
        name, _, _ = str(error).partition(":")
        raise ValueError(re.sub(rf"\b{name}\b", f"{whose}_{name}", str(error))) from None
