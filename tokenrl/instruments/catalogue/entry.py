"""What is said of one row of a table, the same on a terminal and on a page of docs/."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ...objectives.policy import CERTAINTY

PAPER = re.compile(r"\b\d{4}\.\d{5}\b")


@dataclass(frozen=True)
class Entry:
    """A row of a table.

    table: which one. family: the rows that one page of docs/objectives shows. summary, rest: two lines of a list.
    formula: from what goes in to the loss, one step a line. parts: what the row is made of, with its docstring.
    gradient: where it goes. source, certainty: as in the table. feed: what a call is handed, one a line. example:
    Python that runs after the batch of docs/objectives/index.md. backends: whose kernels know the row; none: it is
    computed in torch.
    """

    table: str
    family: str
    name: str
    summary: str
    rest: str
    formula: str
    parts: Mapping[str, str]
    parameters: Mapping[str, Any]
    gradient: str
    source: str
    certainty: str
    feed: tuple[str, ...]
    example: str
    backends: tuple[str, ...]

    @property
    def papers(self) -> list[str]:
        """The arXiv numbers that its source names."""
        return PAPER.findall(self.source)

    @property
    def certainty_words(self) -> list[str]:
        return [CERTAINTY[letter] for letter in self.certainty]

    @property
    def letters(self) -> str:
        return f"[{self.certainty}]" if self.certainty else ""

    @property
    def text(self) -> str:
        """All that a search looks at."""
        return "\n".join((self.name, self.family, self.summary, self.rest, self.formula, *self.parts.values()))

    def as_json(self) -> dict[str, Any]:
        found = asdict(self) | {"certainty": self.certainty_words, "papers": self.papers}
        return {name: value for name, value in found.items() if name not in ("summary", "rest")}


def shown(value: object) -> str:
    return "one per token" if isinstance(value, Tensor) else f"{value}"


def assigned(parameters: Mapping[str, Any]) -> str:
    """As they stand in a call: names with their values, but for those that wait for a tensor."""
    return "".join(f", {name}={value!r}" for name, value in parameters.items() if value is not None and plain(value))


def plain(value: object) -> bool:
    return not isinstance(value, Tensor) and value not in (float("inf"), float("-inf"))


def text_of(part: object, *bases: type) -> str:
    """The docstring of a part, with those it refers to, but for those of its bases."""
    beyond = {above for base in bases for above in base.__mro__}
    lines = [inspect.cleandoc(cls.__doc__) for cls in type(part).__mro__ if cls.__doc__ and cls not in beyond]
    return "\n\n".join(lines)
