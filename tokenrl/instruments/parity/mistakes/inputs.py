"""Mistakes of masks and advantages."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..computation import Change, Computation
from .base import Mistake, flat_gate, has_plain_ratio
from .means import cell_weights, with_weights
from .ratios import At

NOWHERE = -1e4  # a log ratio whose ratio is 0, in fp32 too
EPSILONS = (0.0, 1e-8, 1e-6, 1e-5, 1e-4)


def masks() -> Iterator[Mistake]:
    yield Mistake("mask left out", "every cell takes part", lambda c: c.changed(mask=None), has_mask)
    name = "mask multiplied into the ratio"
    yield Mistake(name, "masked tokens pay for a ratio of 0", lambda c: masked_ratio(c, cell_weights(c)), may_mask)

    def over_all(c: Computation) -> Computation:
        return masked_ratio(c, torch.full((c.layout.num_tokens,), 1 / c.layout.num_tokens, dtype=torch.float64))

    yield Mistake(name, "masked tokens pay for a ratio of 0; mean over all", over_all, may_mask)


def has_mask(computation: Computation) -> bool:
    return "mask" in computation.batch.tensors


def may_mask(computation: Computation) -> bool:
    has = has_mask(computation) and "old_logp" in computation.batch.tensors
    return has and has_plain_ratio(computation) and computation.row.statistic in ("token", "prefix_sum")


def masked_ratio(computation: Computation, weights: Tensor) -> Computation:
    """All cells are valid, the ratio of those that were not is 0."""
    valid = computation.batch.tensors["mask"]
    logp = torch.where(valid | computation.logp.isfinite(), computation.logp, 0)
    old = torch.where(valid, computation.batch.tensors["old_logp"], logp.detach() - NOWHERE)
    gate = At(flat_gate(computation), computation.positions().clamp(min=1))
    new = replace(computation, logp=logp, row=replace(computation.row, gate=gate, clamp=float("inf")))
    return with_weights(new, weights).changed(old_logp=old, mask=None)


def advantages() -> Iterator[Mistake]:
    for over in ("sequences", "group", "tokens"):
        applies = may_normalise(over)
        for less, count in ((1, "n - 1"), (0, "n")):
            for epsilon in EPSILONS:
                how = f"over the {over}, the deviation of {count} and + {epsilon:g}"
                yield Mistake("advantages normalised twice", how, normalised(over, less, epsilon), applies)
        how = f"over the {over}"
        yield Mistake("mean of the advantages taken off twice", how, normalised(over, None, 0.0), applies)


def may_normalise(over: str) -> Callable[[Computation], bool]:
    def applies(computation: Computation) -> bool:
        tensors = computation.batch.tensors
        return "advantages" in tensors and (over != "group" or "group_ids" in tensors)

    return applies


def normalised(over: str, less: int | None, epsilon: float) -> Change:
    """(A - mean) / (deviation + epsilon), variances over n - less; less None: A - mean."""

    def change(computation: Computation) -> Computation:
        given, layout = computation.batch.tensors["advantages"], computation.layout
        per = computation.batch.settings.get("advantages_per")
        a = layout.flat_tokens_or_sequences("advantages", given, given.dtype, per)
        counted, group = _population(computation, over, a)
        number = counted.new_zeros(int(group.max()) + 1 if group.numel() else 0).index_add(0, group, counted)

        def mean(x: Tensor, less: int = 0) -> Tensor:
            total = torch.zeros_like(number).index_add(0, group, torch.where(counted > 0, counted * x, 0))
            return (total / (number - less))[group]

        a = a - mean(a)
        if less is not None:
            a = a / (mean(a.square(), less).sqrt() + epsilon)
        return computation.changed(advantages=a.view(given.shape) if a.numel() == given.numel() else a)

    return change


def _population(computation: Computation, over: str, a: Tensor) -> tuple[Tensor, Tensor]:
    """(how often each advantage counts, its group)."""
    layout, ids = computation.layout, computation.batch.tensors.get("group_ids")
    group = torch.zeros(layout.num_sequences, dtype=torch.int64)
    if over == "group" and ids is not None:
        group = ids.unique(return_inverse=True)[1]
    valid = layout.valid().to(a.dtype)
    if a.numel() == layout.num_tokens:
        return valid, layout.spread(group)
    lengths = valid.new_zeros(layout.num_sequences).index_add(0, layout.rows(), valid)
    return lengths if over == "tokens" else torch.ones_like(a), group
