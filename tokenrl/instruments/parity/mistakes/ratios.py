"""Mistakes of the ratio: which tokens it is made of, and which get its gradient."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ....objectives.forms.base import FormInputs
from ....objectives.gates.base import Gate, straight_through
from ....objectives.statistics import FLOWS
from ..around import Around
from ..computation import Change, Computation
from .base import Mistake, Question, Ratio, flat_gate, has_plain_ratio, with_ratio

ALONE = {"statistic": "token", "flow": "through"}  # the log ratio that is given is the statistic


def is_one_of(*statistics: str) -> Question:
    return lambda computation: has_plain_ratio(computation) and computation.row.statistic in statistics


def has_flow(flow: str, statistic: str) -> Question:
    return lambda computation: is_one_of(statistic)(computation) and computation.row.flow == flow


def exclusive_sum(tokens: FormInputs) -> Tensor:
    return tokens.statistic_of(tokens.x, "prefix_sum") - tokens.x


def exclusive_mean(tokens: FormInputs) -> Tensor:
    return exclusive_sum(tokens) / (tokens.positions() - 1).clamp(min=1)


def exclusive_sum_over_all(tokens: FormInputs) -> Tensor:
    return exclusive_sum(tokens) / tokens.positions().clamp(min=1)


def inclusive_min(tokens: FormInputs) -> Tensor:
    x = tokens.x.detach()
    before = tokens.statistic_of(x, "prefix_min") - x
    return torch.where(tokens.positions() > 1, torch.minimum(before, x), x) + tokens.x


def own_ratio(tokens: FormInputs) -> Tensor:
    return tokens.x


def local(function: Ratio, own: Ratio = own_ratio) -> Ratio:
    """The value of a ratio, with a derivative in the own token alone."""
    return lambda tokens: straight_through(function(tokens), own(tokens))


def prefixes() -> Iterator[Mistake]:
    named = "exclusive instead of inclusive prefix"
    for statistic, function, how in (
        ("prefix_sum", exclusive_sum, "the sum ends before the token"),
        ("prefix_mean", exclusive_mean, "the mean ends before the token"),
        ("prefix_mean", exclusive_sum_over_all, "the sum ends before the token, and is divided by its position"),
    ):
        applies = is_one_of(statistic)
        yield Mistake(named, how, with_ratio(local(function), **ALONE), applies)
        yield Mistake(named, f"{how}; gradient through all of it", with_ratio(function, **ALONE), applies)
    how = "the minimum takes the token itself in"
    applies = is_one_of("prefix_min", "prefix_min_capped")
    yield Mistake("inclusive instead of exclusive prefix", how, with_ratio(inclusive_min, **ALONE), applies)


def exchanged() -> Iterator[Mistake]:
    yield Mistake("old and new exchanged", "the ratio is old / new", with_ratio(lambda t: -t.x), has_plain_ratio)


def with_flow(flow: str) -> Change:
    return lambda computation: computation.with_row(flow=flow)


def may_flow(old: str, new: str) -> Question:
    return lambda computation: computation.row.flow == old and new in FLOWS[computation.row.statistic]


def flows() -> Iterator[Mistake]:
    missing, through = "missing suffix sum", "gradient through the whole ratio"
    how = "each token gets the gradient of its own loss alone"
    yield Mistake(missing, how, with_flow("local"), may_flow("through", "local"))
    yield Mistake(through, "the method stops it in other tokens", with_flow("through"), may_flow("local", "through"))
    for statistic, count in (("span_mean", FormInputs.lengths), ("prefix_mean", FormInputs.positions)):
        change = with_ratio(local(_mean(statistic), _share(count)), **ALONE)
        how = "of a mean each token gets its own share alone"
        yield Mistake(missing, how, change, has_flow("through", statistic))
        how = "a share of the mean; the method gives the own token all"
        yield Mistake("gradient divided by the length", how, change, has_flow("local", statistic))


def _mean(statistic: str) -> Ratio:
    return lambda tokens: tokens.statistic_of(tokens.x, statistic)


def _share(count: Ratio) -> Ratio:
    return lambda tokens: tokens.x / count(tokens).clamp(min=1)


class At(Around):
    """A gate that is told other positions."""

    name = "at"

    def __init__(self, inner: Gate, positions: Tensor):
        super().__init__(inner)
        vars(self)["positions"] = positions

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return self.inner.value(s, x, logp, advantages, vars(self)["positions"])


def cells(computation: Computation) -> Tensor:
    """From 1, of each cell in its sequence, masked or not."""
    layout = computation.layout
    return torch.arange(layout.num_tokens) - layout.cu_seqlens[layout.rows()] + 1


def cells_from_first(computation: Computation) -> Tensor:
    """From 1 at the first valid one."""
    return (cells(computation) - _first_cell(computation) + 1).clamp(min=1)


def _first_cell(computation: Computation) -> Tensor:
    layout, position = computation.layout, cells(computation)
    last = torch.full((layout.num_sequences,), layout.num_tokens)
    first = last.scatter_reduce(0, layout.rows(), torch.where(layout.valid(), position, layout.num_tokens), "amin")
    return layout.spread(first)


def positions() -> Iterator[Mistake]:
    over, from_zero = "position counted over padding", "position counted from 0"
    yield Mistake(over, "masked tokens count", told(cells), has_plain_ratio)
    yield Mistake(over, "masked tokens after the first valid one count", told(cells_from_first), has_plain_ratio)
    yield Mistake(from_zero, "", told(lambda c: c.positions() - 1), has_plain_ratio)
    yield Mistake(f"{from_zero}, over padding", "", told(lambda c: cells(c) - 1), has_plain_ratio)


def told(counted: Callable[[Computation], Tensor]) -> Change:
    """Other positions: for the gate, and where the statistic is a mean for what it is divided by."""

    def change(computation: Computation) -> Computation:
        t = counted(computation).to(computation.logp.dtype)
        moved = computation.with_row(gate=At(flat_gate(computation), t))
        if computation.row.statistic != "prefix_mean":
            return moved

        def mean(tokens: FormInputs) -> Tensor:
            return tokens.statistic_of(tokens.x, "prefix_sum") / t.clamp(min=1)

        return with_ratio(mean if computation.row.flow == "through" else local(mean), **ALONE)(moved)

    return change
