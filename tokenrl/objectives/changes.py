"""A row of a table of objectives with some of its parameters changed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..errors import unknown, wrong

Row = TypeVar("Row")


def changed(row: Row, parameters: Mapping[str, Any], changeable: Sequence[str]) -> Row:
    """parameters: of the row's parts, by their own names, and the fields of the row that are changeable. Unknown names
    raise, naming the nearest."""
    given: Any = row
    changes = {key: value for key, value in parameters.items() if key in changeable}
    known = [parameter for part in given.parts.values() for parameter in part.names]
    for key in parameters:
        if key not in (*known, *changeable):
            raise unknown(f"parameter of {given.name!r}", key, (*known, *changeable))
    for field, part in given.parts.items():
        own = {key: value for key, value in parameters.items() if key in part.names}
        if own and field in changes:
            raise wrong(field, f"a new {field} and {', '.join(own)}", f"one of the two: set them on the new {field}")
        if own:
            changes[field] = dataclasses.replace(part, **own)
    return dataclasses.replace(given, **changes) if changes else row
