"""The two sentences every argument error here is built from."""

import difflib
from collections.abc import Iterable


def unknown(argument: str, given: object, accepted: Iterable[str]) -> ValueError:
    """An error for a name that is not in a table; it names the nearest entry that is."""
    accepted = list(accepted)
    near = difflib.get_close_matches(str(given), accepted, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{argument}: got {given!r}, accepted: {', '.join(accepted)}.{hint}")


def wrong(argument: str, given: object, accepted: str) -> ValueError:
    """An error for a value of a known argument: what was given, what is accepted."""
    return ValueError(f"{argument}: got {given}, accepted: {accepted}.")
