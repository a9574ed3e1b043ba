"""HAPO: the entropy score of each token, and advantages from the average of a group's tokens, without gradient.

Tensors are padded [B, T] with a bool mask, or packed [N] with cu_seqlens [S + 1]; results have that shape, and are 0 in
masked cells, which may hold anything. All is computed in fp64. What looks beyond a row takes the statistics of the
whole batch, so that its parts get the same numbers.

Source: arXiv 2509.16591 (authors' code).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.checks import as_float64, as_lengths, as_rewards, as_scalar, check_name, check_number
from ..batch.groups import SCALES, GroupStatistics, as_groups, statistics_of
from ..batch.valid_tokens import valid_of
from ..errors import wrong

FLOOR = 1e-8


class HapoStatistics(NamedTuple):
    """Of a batch, fp64, 0-d each: pivot, std of the log entropies around it, largest and smallest z."""

    pivot: Tensor
    std: Tensor
    largest: Tensor
    smallest: Tensor


def entropy_statistics(
    entropy: Tensor, *, quantile: float = 0.8, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> HapoStatistics:
    """What hapo_score normalises with, of all valid tokens: for a batch in parts, call this on the whole of it.

    Args:
        entropy: fp32 or fp64 [B, T], or [N] with cu_seqlens, in nats, a constant.
        quantile: in [0, 1], of the pivot, as for hapo_score.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    valid = valid_of(entropy, mask, cu_seqlens, "entropy")
    return _hapo_statistics(valid.take("entropy", entropy), quantile)


def _hapo_statistics(entropy: Tensor, quantile: float) -> HapoStatistics:
    check_number("quantile", quantile, 0, 1)
    x = entropy.clamp(min=FLOOR).log()
    # The batch without a token has pivot 0, as in the authors' code.
    ordered = x.sort().values if x.numel() else x.new_zeros(1)
    pivot = ordered[round(quantile * (ordered.numel() - 1))]
    std = ((x - pivot).square().sum() / max(x.numel(), 1)).clamp(min=FLOOR).sqrt()
    z = torch.cat([(x - pivot) / std, x.new_zeros(1)])
    return HapoStatistics(pivot, std, z.amax().clamp(min=FLOOR), z.amin().clamp(max=-FLOOR))


def hapo_score(
    entropy: Tensor,
    *,
    quantile: float = 0.8,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    statistics: HapoStatistics | None = None,
    compat_sign_bug: bool = False,
) -> Tensor:
    """h in [-1, 1] of entropy's shape and dtype, the `score` of objective "hapo".

        x = log max(H, 1e-8), z = (x - pivot) / std, std^2 = mean (x - pivot)^2, h = z / max z, or z / |min z| below 0

    Floors of 1e-8 under std^2, max z and |min z|. h is kept in [-1, 1].

    Args:
        entropy: fp32 or fp64 [B, T], or [N] with cu_seqlens, in nats, a constant.
        quantile: of x over the valid tokens, that of the nearest rank, for the pivot (0.8 in every recipe of the
            authors).
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        statistics: hapo_statistics of the whole of a batch that comes in parts, in place of quantile; the authors take
            those of each micro-batch.
        compat_sign_bug: |h|, what the authors' code computes (and ran with): it divides by min z, not by its magnitude.
    """
    valid = valid_of(entropy, mask, cu_seqlens, "entropy")
    x = valid.take("entropy", entropy)
    given = _hapo_statistics(x, quantile) if statistics is None else statistics
    pivot, std, largest, smallest = (
        as_scalar(f"statistics.{name}", value, x) for name, value in zip(HapoStatistics._fields, given, strict=True)
    )
    z = (x.clamp(min=FLOOR).log() - pivot) / std
    h = (z / torch.where(z > 0, largest, -smallest)).clamp(-1, 1)
    return valid.put(h.abs() if compat_sign_bug else h, entropy.dtype)


def reward_statistics(
    rewards: Tensor,
    lengths: Tensor,
    group_ids: Tensor | None,
    *,
    scale: str = "std",
    eps: float = 1e-6,
    limit: float = 5.0,
    width: int | None = None,
    singleton: str = "raw",
    unscored: str = "raise",
) -> GroupStatistics:
    """What hapo subtracts and divides by, fp64 [S]: hand the own slice of those of all rows to it as mean=, std=.

    Args:
        rewards: fp32 or fp64 [S], a constant; all as for hapo.
        lengths: integers [S].
        group_ids: integers [S].
        scale: "std" or "none".
        eps: at least 0.
        limit: above 0.
        width: T, or None.
        singleton: as for grpo.
        unscored: as for grpo.
    """
    check_name("scale", scale, SCALES)
    check_number("limit", limit, above=0, accepted="a positive number, inf to turn the fallback off")
    check_number("eps", eps, 0)
    x, groups = as_rewards(rewards, unscored=unscored), as_groups(group_ids, rewards, unscored)
    n, plain = as_lengths(lengths, x), statistics_of(x, groups, True, singleton)
    mean = groups.mean(x, n)
    std = (groups.sum(n * (x - mean) ** 2) / groups.sum(n).clamp(min=1)).sqrt()
    over = std + eps if scale == "std" else torch.ones_like(x)
    far = (n > 0) & ((x - mean).abs() / over >= limit)
    if width is not None:
        far |= (n < width) & (mean.abs() / over >= limit)
    fallback = (groups.sum(far.double()) > 0) | (plain.count == 1) | (n == 0)
    return GroupStatistics(torch.where(fallback, plain.mean, mean), torch.where(fallback, plain.std, std), plain.count)


def hapo(
    rewards: Tensor,
    lengths: Tensor | None = None,
    group_ids: Tensor | None = None,
    *,
    scale: str = "std",
    eps: float = 1e-6,
    limit: float = 5.0,
    width: int | None = None,
    singleton: str = "raw",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    unscored: str = "raise",
) -> Tensor:
    """HAPO's token-level group average, A = (R - mean) / (std + eps), one for all tokens of a row: [S], lengths n [S]
    -> [S].

    mean and std (over n) are those of the group's tokens, a row counting n_i times. A group in which any row with
    tokens has |A| >= limit has those of grpo in their place; so have a group of one row, by singleton, and a row
    without tokens (our reading).

    Args:
        rewards: fp32 or fp64 [S], a constant.
        lengths: integers [S], n, tokens of the responses. None with mean and std.
        group_ids: integers [S]; rollouts of one prompt share one. None with mean and std.
        scale: "none" does not divide, and limit bounds R - mean.
        eps: added to the std.
        limit: above 0, of |A|; inf turns the fallback off.
        width: T of a padded batch; the authors' code also tests the masked cells, whose reward is 0, as this then does.
            None (our reading): padding does not matter.
        singleton: as for grpo.
        mean: [S], with std, of hapo_statistics over all rows of the groups; nothing else but eps is then used.
        std: [S], likewise.
        unscored: as for grpo.
    """
    check_name("scale", scale, SCALES)
    check_number("eps", eps, 0)
    if (mean is None) != (std is None):
        raise wrong("std" if std is None else "mean", None, "both of mean and std, or neither")
    x = as_rewards(rewards, unscored=unscored)
    if mean is None or std is None:
        if lengths is None:
            raise wrong("lengths", None, f"one integer per sequence, [{x.numel()}], or the statistics of the groups")
        mean, std, _ = reward_statistics(
            rewards, lengths, group_ids, scale=scale, eps=eps, limit=limit, width=width, singleton=singleton,
            unscored=unscored,
        )  # fmt: skip
    centred, spread = x - as_float64("mean", mean, x.shape, x), as_float64("std", std, x.shape, x)
    return (centred / (spread + eps) if scale == "std" else centred).to(rewards.dtype)
