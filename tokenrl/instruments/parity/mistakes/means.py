"""Mistakes of the aggregation: what is divided by what."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ....losses.aggregation import span_weights
from ....objectives.aggregations import AGGREGATIONS
from ....ops.backends import BACKENDS
from ..computation import Change, Computation
from .base import Mistake

SUMS = ("token-sum", "seq-mean-token-sum")


def mode(computation: Computation) -> str:
    return computation.batch.settings.get("aggregation") or computation.row.aggregation


def is_mode(*modes: str) -> Callable[[Computation], bool]:
    return lambda computation: mode(computation) in modes and computation.row.name != "real"


def is_padded(computation: Computation) -> bool:
    return computation.layout.width is not None


def to_mode(aggregation: str) -> Change:
    return lambda computation: computation.set(aggregation=aggregation, normalizer=None)


def may_be(other: str) -> Callable[[Computation], bool]:
    """A batch has what that mode needs, and it is not the one that is right."""

    def applies(computation: Computation) -> bool:
        needed = AGGREGATIONS[other]
        has = not needed.by_group or "group_ids" in computation.batch.tensors
        has = has and (not needed.over_width or is_padded(computation))
        return has and mode(computation) != other and computation.row.name != "real"

    return applies


def divided_by(aggregation: str | None, count: Callable[[Computation], float]) -> Change:
    return lambda computation: computation.set(
        aggregation=aggregation or mode(computation), normalizer=float(count(computation))
    )


def with_weights(computation: Computation, weights: Tensor) -> Computation:
    """The sum of the losses under weights of all cells [N], times those that are given."""
    weights = weights.view(computation.layout.shape).to(computation.logp.dtype)
    given = computation.batch.tensors.get("token_weight")
    return computation.changed(token_weight=weights if given is None else given * weights).set(
        aggregation="token-sum", normalizer=None
    )


def cell_weights(computation: Computation) -> Tensor:
    """[N]: what a token weighs in the mode, valid or not."""
    layout, tensors = computation.layout, computation.batch.tensors
    flat = {}
    if "advantages" in tensors:
        per = computation.batch.settings.get("advantages_per")
        flat["advantages"] = layout.flat_tokens_or_sequences("advantages", tensors["advantages"], torch.float64, per)
    found = span_weights(
        mode(computation), layout, advantages=flat.get("advantages"), group_ids=tensors.get("group_ids"),
        normalizer=computation.batch.settings.get("normalizer"), backend=BACKENDS["reference"],
    )  # fmt: skip
    return layout.spread(torch.where(found.span_weight == 0, 0, found.span_weight / found.normalizer))


def rows(computation: Computation) -> int:
    """Sequences with a valid token."""
    layout = computation.layout
    return int(layout.rows()[layout.valid()].unique().numel())


def by_cells(computation: Computation) -> Computation:
    """Packed: each sequence's sum over all of its cells."""
    layout = computation.layout
    lengths = layout.spread(layout.cu_seqlens.diff().double())
    return with_weights(computation, 1 / lengths / rows(computation))


def padded(computation: Computation) -> int:
    return computation.layout.num_tokens


def width(computation: Computation) -> int:
    return computation.layout.width or 1


def means() -> Iterator[Mistake]:
    name, per_token, per_row = "mean over padded length", is_mode("token-mean"), is_mode("seq-mean-token-mean")

    def padded_row(computation: Computation) -> bool:
        return per_row(computation) and is_padded(computation)

    yield Mistake(name, "the sum over all tokens / (B T)", divided_by("token-sum", padded), per_token)
    summed = divided_by("seq-mean-token-sum", lambda c: rows(c) * width(c))
    yield Mistake(name, "the sum of a sequence / T", summed, padded_row)
    of_all = divided_by("seq-mean-token-sum", padded)
    yield Mistake(name, "the sum of a sequence / T, and empty ones count", of_all, padded_row)
    yield Mistake(
        name, "the sum of a sequence / all of its tokens", by_cells, lambda c: per_row(c) and not is_padded(c)
    )
    of_empty = divided_by(None, lambda c: c.layout.num_sequences)
    per_sequence = is_mode("seq-mean-token-mean", "seq-mean-token-sum")
    yield Mistake("mean over empty sequences too", "", of_empty, per_sequence)
    for summed_as in SUMS:
        yield Mistake("sum instead of mean", summed_as, to_mode(summed_as), may_be(summed_as))
    yield Mistake("sum instead of mean", "of what the means are", divided_by(None, lambda c: 1.0))
    for other in AGGREGATIONS:
        if other not in SUMS:
            yield Mistake(f"aggregated as {other}", "", to_mode(other), may_be(other))
