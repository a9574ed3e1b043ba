"""GTPO: weights of the tokens that good and bad rollouts share, without gradient.

    A' = entropy_shaped_advantages(A, entropy, mask=mask)
    lam = conflict_weights(ids, A, group_ids, mask=mask) / conflict_lengths(ids, A, group_ids, mask=mask)[:, None]
    policy_loss("ppo", logp, None, A', mask=mask, token_weight=lam, aggregation="seq-mean-token-mean")

is the authors' loss on one group, with normalizer=1 as they have it (a sum over the rollouts); the paper's formula has
no division by conflict_lengths. Groups must be whole in a call. Tensors are padded [B, T] with a bool mask, or packed
[N] with cu_seqlens [S + 1]; results are 0 in masked cells, which may hold anything.

Source: arXiv 2508.03772 (authors' code).
"""

import torch
from torch import Tensor

from ..batch.checks import as_float64, check_integers, check_number
from ..batch.groups import as_groups, groups_of
from ..batch.spans import spans_of
from ..batch.valid_tokens import ValidTokens, valid_of


def conflict_weights(
    ids: Tensor,
    advantages: Tensor,
    group_ids: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    positive: float = 2.0,
    negative: float = 0.0,
) -> Tensor:
    """lambda per token, of ids' shape and the advantages' dtype.

    A token is in conflict where a rollout of its group with A > 0 and one with A < 0 have the same id at its position,
    counted in valid tokens from the left, or from the right. Its factor is `positive` in a row with A > 0 and
    `negative` in a row with A < 0, as long as all before it (from the right: behind it) are in conflict as well,
    else 1; lambda is the product of the factors from the left and from the right. Rows with A = 0 have 1 and match
    nobody. That masked cells inside a row are no positions is our reading.

    Args:
        ids: integers [B, T], or [N] with cu_seqlens, the sampled tokens.
        advantages: fp32 or fp64 [S], those before any shaping.
        group_ids: integers [S]; groups must be whole in a call.
        mask: bool of the shape of ids.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        positive: a number.
        negative: a number.
    """
    check_number("positive", positive)
    check_number("negative", negative)
    valid, sign, *runs = _runs(ids, advantages, group_ids, mask, cu_seqlens)
    weight = torch.where(sign > 0, torch.full_like(sign, positive), negative)
    out = torch.ones_like(sign)
    for place, run in runs:
        out = torch.where(place < run[valid.row], out * weight, out)
    return valid.put(out, advantages.dtype)


def conflict_lengths(
    ids: Tensor,
    advantages: Tensor,
    group_ids: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """int64 [S]: the longer of a row's two conflict runs, at least 1: what the authors' code divides its loss by.

    Args:
        ids: as for conflict_weights, and so are the others.
        advantages: fp32 or fp64 [S].
        group_ids: integers [S].
        mask: bool of the shape of ids.
        cu_seqlens: integers [S + 1].
    """
    _, _, (_, left), (_, right) = _runs(ids, advantages, group_ids, mask, cu_seqlens)
    return torch.maximum(left, right).clamp(min=1)


def _runs(
    ids: Tensor, advantages: Tensor, group_ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[ValidTokens, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The M valid tokens, the signs of their A [M], and from the left and from the right: positions [M], lengths of the
    runs [S]."""
    check_integers("ids", ids)
    valid = valid_of(ids, mask, cu_seqlens, "ids")
    rows = valid.layout.num_sequences
    signs = as_float64("advantages", advantages, (rows,), ids).sign()
    sign, group = signs[valid.row], as_groups(group_ids, signs).index[valid.row]
    lengths = torch.bincount(valid.row, minlength=rows)
    left = torch.arange(sign.numel(), device=ids.device) - (lengths.cumsum(0) - lengths)[valid.row]
    right = lengths[valid.row] - 1 - left
    distinct = groups_of(valid.layout.flat_tokens("ids", ids)[valid.cells])
    found = []
    for place in (left, right):
        pair = group * (valid.layout.width or sign.numel()) + place
        same = groups_of(pair * distinct.number + distinct.index)
        conflict = (sign != 0) & (same.max(sign) > 0) & (same.max(-sign) > 0)
        ends = torch.where(conflict, lengths[valid.row], place)
        found.append((place, lengths.scatter_reduce(0, valid.row, ends, "amin")))
    return valid, sign, found[0], found[1]


def entropy_shaped_advantages(
    advantages: Tensor,
    entropy: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float = 0.1,
    threshold: float = 0.7,
) -> Tensor:
    """A - scale <H>, and 0 where <H> > threshold: [S] -> [S], <H> the mean entropy of the row's valid tokens. A row
    without
    tokens has <H> = 0.

    Args:
        advantages: fp32 or fp64 [S], a constant.
        entropy: fp32 or fp64 [B, T], or [N] with cu_seqlens, in nats, a constant.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        scale: at least 0, in units of the advantage per nat.
        threshold: nats: 0.7 in the code, ln 2 in the paper; inf: no row is dropped. The paper keeps all rows where the
            entropy of the first policy is above it, the code does not.
    """
    check_number("scale", scale, 0)
    check_number("threshold", threshold, 0, accepted="a number, at least 0 (inf: no row is dropped)")
    valid = valid_of(entropy, mask, cu_seqlens, "entropy")
    a = as_float64("advantages", advantages, (valid.layout.num_sequences,), entropy)
    x = valid.put(valid.take("entropy", entropy), a.dtype)
    mean = spans_of("sequence", valid.layout).mean(x.reshape(-1))
    return torch.where(mean > threshold, 0.0, a - scale * mean).to(advantages.dtype)
