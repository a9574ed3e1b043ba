"""Divergences of two heads whose columns lie on ranks: what travels, and what is made of it.

With l_i, m_i the lse of both heads on rank i, P_i = e^(l_i - l) and R_i = e^(m_i - m) are the rank's shares of the
probability. A kind that weighs logs, such as sum r (log r - log p), is of the ranks' own distributions

    D = sum_i R_i (D_i + log R_i - log P_i)

and takes one read of the logits. Any other is a sum over the vocabulary once both lse are known.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import wire
from ..ops.divergence_ops import DivergenceInputs

P, R = 0, 1  # the trained head and the other one
# Kinds of one read: whose probability weighs, and whether by its own log too.
WEIGHED_BY = {"forward_kl": (R, True), "reverse_kl": (P, True), "cross_entropy": (R, False)}
FOR_LSE = "forward_kl"  # the kernels find both lse in one read, beside it
Sums = tuple[Tensor, Tensor, Tensor]  # [n] each: the divergence, by_p, by_r, as op divergence has them


def whole_statistics(parts: Tensor) -> Tensor:
    """[4, n] of the vocabulary, as op divergence takes them, of [W, 4, n] of the ranks' columns."""
    lse = whole_lse(parts)
    rounded = lse.to(parts.dtype)
    rest = torch.where(lse == -torch.inf, 0, lse - rounded)
    return torch.stack([rounded, rest.to(parts.dtype)], 1).flatten(0, 1)


def whole_lse(parts: Tensor) -> Tensor:
    """fp64 [2, n], of both heads."""
    return _lse(parts).logsumexp(0)


def _lse(statistics: Tensor) -> Tensor:
    """fp64 [..., 2, n] of [..., 4, n]."""
    rounded, rest = statistics.double().unflatten(-2, (2, 2)).unbind(-2)
    return torch.where(rounded == -torch.inf, rounded, rounded + rest)


def weighed(kind: str, value: Tensor, own: Tensor, whole: Tensor) -> Tensor:
    """What columns add to a divergence of one read, fp64 [..., n]: value [..., n], of their own distributions; own
    [..., 4, n], whole [4, n]: their statistics and those of the vocabulary."""
    side, by_own_log = WEIGHED_BY[kind]
    log_shares = _lse(own) - _lse(whole)
    log_weight, log_other = log_shares[..., side, :], log_shares[..., 1 - side, :]
    shift = (log_weight if by_own_log else 0) - log_other
    added = torch.where(log_other == -torch.inf, torch.inf, value + shift)
    weight = log_weight.exp()
    return torch.where(weight == 0, 0, weight * added)


def of_one_read(kind: str, value: Tensor) -> Sums:
    """Of the divergence of the vocabulary."""
    side, by_own_log = WEIGHED_BY[kind]
    by = [torch.full_like(value, -1)] * 2
    by[side] = value + by_own_log  # another tensor than the value
    return value, by[P], by[R]


def of_vocabulary(
    ops: Any, group: dist.ProcessGroup, logits: Tensor, other_logits: Tensor, statistics: Tensor | None,
    given: DivergenceInputs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Op divergence of the vocabulary, by that of the own columns [n, V_r]. One exchange where statistics, of the
    vocabulary, are given, or the kind is of one read; else two."""
    *lead, _, _ = given
    one_read = given.kind in WEIGHED_BY
    if statistics is None:
        kind = (given.kind, given.params) if one_read else (FOR_LSE, [])
        value, _, _, own = ops.divergence(logits, other_logits, None, *lead, *kind)
        every = wire.all_gather(torch.cat([own, value[None]] if one_read else [own]), group)
        statistics = whole_statistics(every[:, :4])
        if one_read:
            total = weighed(given.kind, every[:, 4], every[:, :4], statistics).sum(0)
            return *_counted(of_one_read(given.kind, total), given.rows, value.dtype), statistics
    *found, own = ops.divergence(logits, other_logits, statistics, *given)
    sent = weighed(given.kind, found[0], own, statistics)[None] if one_read else torch.stack(found)
    total = wire.all_gather(sent.to(statistics.dtype), group).double().sum(0)
    sums = of_one_read(given.kind, total[0]) if one_read else tuple(total)
    return *_counted(sums, given.rows, statistics.dtype), statistics


def _counted(sums: Sequence[Tensor], rows: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """0 where there is no divergence; none a view of another."""
    rows = torch.ones_like(sums[0], dtype=torch.bool) if rows is None else rows
    return (torch.where(rows, x, 0).to(dtype) for x in sums)
