"""Bundles of arguments that are their own schema: the fields of a class are arguments of an op, in their order.

An op takes `*bundle`, its schema is written from the fields' names and annotations, and what it was given is read back
by `Bundle(*args)`. Where bundles inherit from several, the fields of the last base come first, as in dataclasses.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import Self

_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor | None]: "Tensor?[]", float: "float",
    list[float]: "float[]", int: "int", list[int]: "int[]", bool: "bool",
    list[bool]: "bool[]", str: "str", str | None: "str?", list[str]: "str[]",
}  # fmt: skip


@dataclass(frozen=True)
class OpArguments:
    """Base of all bundles."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__.values())

    @classmethod
    def read(cls, args: tuple[Any, ...]) -> tuple[Self, tuple[Any, ...]]:
        """(the bundle of the first arguments, the arguments after them)."""
        count = len(dataclasses.fields(cls))
        return cls(*args[:count]), args[count:]


def schema(*parts: type[OpArguments] | str, returns: str) -> str:
    """The schema of an op whose arguments are those of each bundle, or of each piece of schema text, in turn."""
    texts = [part if isinstance(part, str) else _text(part) for part in parts]
    return f"({', '.join(texts)}) -> {returns}"


def _text(bundle: type[OpArguments]) -> str:
    return ", ".join(f"{_TYPES[field.type]} {field.name}" for field in dataclasses.fields(bundle))
