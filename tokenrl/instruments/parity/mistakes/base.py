"""A mistake: a step of a computation done in another way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ....objectives.forms.base import Form, FormInputs
from ....objectives.gates.base import Gate, map_params
from ..computation import Change, Computation

Question = Callable[[Computation], bool]
Ratio = Callable[[FormInputs], Tensor]  # log ratios, [N]


@dataclass(frozen=True)
class Mistake:
    """name: what it is called. how: what is computed, where the name does not say it. applies: whether a computation
    has such a step."""

    name: str
    how: str
    change: Change
    applies: Question = lambda computation: True

    def __str__(self) -> str:
        return f"{self.name} ({self.how})" if self.how else self.name


class LogRatio(Form):
    """A row with other log ratios."""

    def __init__(self, function: Ratio):
        vars(self)["function"] = function

    def evaluate(self, tokens: FormInputs) -> tuple[Tensor, Tensor]:
        return tokens.run(log_ratio=vars(self)["function"](tokens))


def has_plain_ratio(computation: Computation) -> bool:
    """Its log ratios may be replaced: no form does so, and the gate has one slope."""
    return computation.row.form is None and len(computation.row.gate.slopes) == 1


def with_ratio(function: Ratio, **row: Any) -> Change:
    """Other log ratios, from which the row's statistic is taken, or another row's."""

    def change(computation: Computation) -> Computation:
        return computation.with_row(form=LogRatio(function), **row)

    return change


def flat_gate(computation: Computation) -> Gate:
    """The gate, its tensors flat."""
    layout, dtype = computation.layout, computation.logp.dtype
    return map_params(computation.row.gate, lambda name, bound: layout.flat_tokens(name, bound.to(dtype)))


def with_gate(make: Callable[[Computation], Gate]) -> Change:
    def change(computation: Computation) -> Computation:
        return computation.with_row(gate=make(computation))

    return change
