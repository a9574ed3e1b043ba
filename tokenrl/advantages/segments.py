"""SPO: advantages of segments between points whose value was estimated by rollouts, without gradient.

A chain (short answers) is cut where the policy was unsure: spo_cutpoints says where, the caller rolls out from these
states, spo_chain makes the estimates advantages. A tree (long answers) of fixed segments has them on its edges:
spo_tree. Either way the loss is PPO's over the tokens that spo_mask leaves:

    unsure = spo_mask(old_logp, mask)
    loss, metrics = policy_loss(objective("ppo", clamp=10.0), logp, old_logp, whiten(a, unsure), mask=unsure)

which the authors multiply by 0 where metrics.ratio_mean > 10.

Source: arXiv 2505.23564 (authors' code).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.checks import (
    as_float64,
    as_rewards,
    check_constant,
    check_floats,
    check_integers,
    check_name,
    check_number,
    check_tensor,
)
from ..batch.groups import Groups
from ..batch.layout import layout_of
from ..batch.valid_tokens import ValidTokens, valid_of
from ..errors import wrong

METHODS = ("rloo", "grpo")
INNER = ("mean", "given")


class SpoCuts(NamedTuple):
    """positions: int64 [S, K], K the most cuts that a row has: a state is what lies before the cell at this position of
    the row, 0 the prompt alone; -1 past the row's last. segment_ids: int64 of the tokens' shape, which of the row's
    cuts a token follows; -1 before the first and in masked cells."""

    positions: Tensor
    segment_ids: Tensor


class SpoEdges(NamedTuple):
    """Of each node and the edge that leads to it, [N]: its value, the advantage of the edge, and whether it is worth
    training on (False for roots and for edges whose advantage is 0)."""

    values: Tensor
    advantages: Tensor
    kept: Tensor


def _check_threshold(threshold: float) -> None:
    check_number("threshold", threshold, most=1, above=0, accepted="a probability, above 0 and at most 1")


def spo_mask(
    old_logp: Tensor, mask: Tensor | None = None, *, threshold: float = 0.9, cu_seqlens: Tensor | None = None
) -> Tensor:
    """bool of old_logp's shape: the valid tokens with exp(old_logp) < threshold, which alone have a loss and are
    counted in its mean.

    Args:
        old_logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, a constant.
        mask: bool of that shape.
        threshold: a probability, above 0 and at most 1.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    _check_threshold(threshold)
    layout = layout_of(old_logp, mask=mask, cu_seqlens=cu_seqlens, name="old_logp")
    check_floats("old_logp", old_logp)
    check_constant("old_logp", old_logp)
    flat = layout.flat_tokens("old_logp", old_logp, torch.float64)
    return ((flat.exp() < threshold) & layout.valid()).view(layout.shape)


def spo_cutpoints(
    old_logp: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float = 0.9,
    interval: int = 5,
    cu_seqlens: Tensor | None = None,
) -> SpoCuts:
    """Where to estimate values: before the first token of a row with exp(old_logp) < threshold, and before every
    interval-th such token after it.

    The authors' code counts a state by its last token, one less than positions. Masked cells are no tokens to cut at;
    they count in positions, as a rollout has to go on from them too (our reading).

    Args:
        old_logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, a constant.
        mask: bool of that shape.
        threshold: a probability, above 0 and at most 1.
        interval: an integer, at least 1.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    if not isinstance(interval, int) or interval < 1:
        raise wrong("interval", interval, "an integer, at least 1")
    unsure = spo_mask(old_logp, mask, threshold=threshold, cu_seqlens=cu_seqlens)
    tokens = valid_of(old_logp, mask, cu_seqlens, "old_logp")
    at, row, start = unsure.reshape(-1)[tokens.cells], tokens.row, tokens.layout.cu_seqlens
    cut = at & ((_count(at, tokens) - 1) % interval == 0)
    segment = _count(cut, tokens) - 1
    most = int(segment.max()) + 1 if segment.numel() else 0
    positions = row.new_full((tokens.layout.num_sequences, most), -1)
    positions[row[cut], segment[cut]] = tokens.cells[cut] - start[row[cut]]
    ids = row.new_full((tokens.layout.num_tokens,), -1)
    ids[tokens.cells] = segment
    return SpoCuts(positions, ids.view(tokens.layout.shape))


def _count(which: Tensor, tokens: ValidTokens) -> Tensor:
    """int64 [M]: how many tokens of the row are so, up to and including this one."""
    total = which.long().cumsum(0)
    of_row = total.new_zeros(tokens.layout.num_sequences).index_add_(0, tokens.row, which.long())
    return total - (of_row.cumsum(0) - of_row)[tokens.row]


def spo_chain(
    values: Tensor,
    rewards: Tensor,
    segment_ids: Tensor,
    old_logp: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float | None = 0.9,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A_t = V(end of t's segment) - V(its start): [S, K], [S] -> old_logp's shape and values' dtype.

    Args:
        values: fp32 or fp64 [S, K], of the row's k-th cut (spo_cutpoints; of other segments just as well); what lies
            past a row's last segment may be anything.
        rewards: [S], the score of the response, the value at the end of its last segment.
        segment_ids: integers of old_logp's shape, 0, 1, ... along a row and -1 where no value is known: these tokens
            get 0.
        old_logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, a constant.
        mask: bool of that shape.
        threshold: tokens with exp(old_logp) > threshold get 0, too; None keeps them.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    if threshold is not None:
        _check_threshold(threshold)
    tokens = valid_of(old_logp, mask, cu_seqlens, "old_logp")
    check_integers("segment_ids", segment_ids)
    segment = tokens.layout.flat_tokens("segment_ids", segment_ids, torch.int64)[tokens.cells]
    row, size = tokens.row, tokens.layout.num_sequences
    check_tensor("values", values)
    if values.dim() != 2:
        raise wrong("values", f"shape {list(values.shape)}", f"[{size}, K], a row per sequence")
    v = as_float64("values", values, (size, values.shape[1]), old_logp)
    score = as_float64("rewards", rewards, (size,), old_logp)
    if ((segment >= v.shape[1]) | (segment < -1)).any():
        raise wrong("segment_ids", f"{segment.min()} to {segment.max()}", f"-1 to {v.shape[1] - 1}, a column of values")
    used = segment.new_zeros(size).scatter_reduce_(0, row, segment + 1, "amax")
    v = torch.cat([v, score[:, None]], 1).scatter(1, used[:, None], score[:, None])
    known = segment >= 0
    if threshold is not None:
        known = known & (tokens.take("old_logp", old_logp).exp() <= threshold)
    begin = segment.clamp(min=0)
    end = (begin + 1).clamp(max=v.shape[1] - 1)
    return tokens.put(torch.where(known, v[row, end] - v[row, begin], 0.0), values.dtype)


def spo_tree(
    values: Tensor,
    parents: Tensor,
    *,
    method: str = "rloo",
    inner: str = "mean",
    eps: float = 1e-8,
    tolerance: float = 1e-9,
) -> SpoEdges:
    """Advantages of the edges of trees, A = V(node) - V(parent) ("rloo"), or that divided by the std (over n) of the
    parent's children + eps ("grpo"). A kept edge is a training sample: its advantage stands on the tokens of its own
    segment.

    Args:
        values: fp32 or fp64 [N], of the nodes, a constant.
        parents: integers [N], the index of each node's parent in any order, -1 for a root.
        method: "rloo" or "grpo".
        inner: "mean", the value of a node with children is the mean of theirs, and what values holds there is not read;
            "given", values holds it.
        eps: at least 0.
        tolerance: differences of values up to it are rounding, and 0 (our reading).
    """
    for name, value, accepted in (("method", method, METHODS), ("inner", inner, INNER)):
        check_name(name, value, accepted)
    check_number("eps", eps, 0)
    check_number("tolerance", tolerance, 0)
    v, up = as_rewards(values, "values", "[N]"), _as_parents(parents, values)
    below = (up >= 0).nonzero()[:, 0]
    families = Groups(up[below], v.numel())
    if inner == "mean":
        v = _means_upwards(v, up, below)
    difference = torch.zeros_like(v)
    difference[below] = v[below] - v[up[below]]
    difference = torch.where(difference.abs() <= tolerance, 0.0, difference)
    advantages = difference
    if method == "grpo":
        ones = torch.ones_like(v[below])
        spread = families.mean((v[below] - families.mean(v[below], ones)).square(), ones).sqrt()
        advantages = difference.clone()
        advantages[below] /= spread + eps
    return SpoEdges(v.to(values.dtype), advantages.to(values.dtype), difference != 0)


def _as_parents(parents: Tensor, values: Tensor) -> Tensor:
    check_integers("parents", parents)
    if parents.shape != values.shape or parents.device != values.device:
        raise wrong("parents", f"{list(parents.shape)} on {parents.device}", f"{list(values.shape)} on {values.device}")
    if ((parents < -1) | (parents >= parents.numel())).any():
        raise wrong("parents", f"{int(parents.min())} to {int(parents.max())}", f"-1 to {parents.numel() - 1}")
    return parents.long()


def _means_upwards(v: Tensor, up: Tensor, below: Tensor) -> Tensor:
    """Values with those of nodes with children made the means of theirs, a level of the tree at a time."""
    children = torch.bincount(up[below], minlength=v.numel())
    known = children == 0
    while not known.all():
        ready = below[known[below]]
        found = torch.bincount(up[ready], minlength=v.numel())
        now = ~known & (found == children)
        if not now.any():
            raise wrong("parents", "a cycle", "trees: every node's line of parents ends in -1")
        ready = ready[now[up[ready]]]
        means = Groups(up[ready], v.numel()).mean(v[ready], torch.ones_like(v[ready]))
        v = v.index_copy(0, up[ready], means)
        known = known | now
    return v
