"""Groups of sequences: sums, maxima and statistics of rewards per group."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import wrong
from .checks import as_rewards, check_integers, check_name

SINGLETONS = ("raw", "zero")
SCALES = ("std", "none")  # what a centred reward is divided by


class GroupStatistics(NamedTuple):
    """Of each sequence's group, fp64 [S] each: mean and std of its rewards, number of its sequences."""

    mean: Tensor
    std: Tensor
    count: Tensor  # type: ignore[assignment]  # hides the count of a tuple


@dataclass(frozen=True)
class Groups:
    """index: int64 [S], the group of a sequence in [0, number). Totals are per group, sums and maxima per sequence."""

    index: Tensor
    number: int

    def total(self, x: Tensor) -> Tensor:
        """[number]"""
        return x.new_zeros(self.number).index_add_(0, self.index, x)

    def sum(self, x: Tensor) -> Tensor:
        return self.total(x).index_select(0, self.index)

    def max(self, x: Tensor) -> Tensor:
        highest = x.new_full((self.number,), -torch.inf).scatter_reduce_(0, self.index, x, "amax")
        return highest.index_select(0, self.index)

    def mean(self, x: Tensor, weight: Tensor) -> Tensor:
        """sum(w x) / sum(w) of the group, around its minimum, so that equal values have exactly their own as mean."""
        low, total = -self.max(-x), self.sum(weight)
        return low + torch.where(total > 0, self.sum(weight * (x - low)) / total, 0.0)

    def top_two(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(whether a sequence alone holds the maximum of its group, the maximum of the others; -inf if there is none).
        Where the maximum is shared nobody holds it alone."""
        best = x == self.max(x)
        alone = best & (self.sum(best.to(x.dtype)) == 1)
        return alone, self.max(torch.where(best, -torch.inf, x))


def as_groups(group_ids: Tensor | None, rewards: Tensor, unscored: str = "raise") -> Groups:
    """unscored: "nan", rows with a NaN in rewards are a group of their own, which the others' statistics do not see."""
    rows = rewards.shape[0]
    if group_ids is None:
        raise wrong("group_ids", None, f"one integer per sequence, [{rows}], or the statistics of the groups")
    check_integers("group_ids", group_ids)
    if group_ids.shape != (rows,) or group_ids.device != rewards.device:
        raise wrong(
            "group_ids", f"{list(group_ids.shape)} on {group_ids.device}", f"shape [{rows}] on {rewards.device}"
        )
    groups = groups_of(group_ids)
    if unscored == "raise":
        return groups
    scored = ~rewards.reshape(rows, -1).isnan().any(1)
    return Groups(torch.where(scored, groups.index, groups.number), groups.number + 1)


def groups_of(ids: Tensor) -> Groups:
    distinct, index = ids.unique(return_inverse=True)
    return Groups(index, distinct.numel())


def statistics_of(x: Tensor, groups: Groups, unbiased: bool, singleton: str) -> GroupStatistics:
    check_name("singleton", singleton, SINGLETONS)
    # Per group until the end, and few calls into torch: of a small batch they are all that it costs.
    index, count = groups.index, groups.total(torch.ones_like(x))
    low = x.new_full((groups.number,), torch.inf).scatter_reduce_(0, index, x, "amin")
    mean = groups.total(x - low.index_select(0, index)).div_(count).add_(low)  # around the minimum, as Groups.mean
    centred = x - mean.index_select(0, index)
    over = count.sub(1).clamp_min_(1) if unbiased else count
    std = groups.total(centred * centred).div_(over).sqrt_()
    if singleton == "raw":
        alone = count == 1
        mean.masked_fill_(alone, 0.0)
        std.masked_fill_(alone, 1.0)
    return GroupStatistics(*(each.index_select(0, index) for each in (mean, std, count)))


def group_statistics(
    rewards: Tensor, group_ids: Tensor, *, unbiased: bool = True, singleton: str = "raw", unscored: str = "raise"
) -> GroupStatistics:
    """Mean, std (over n - 1, or n if not unbiased) and count of each sequence's group, fp64 [S]: gather the rewards of
    all ranks, call this, and hand the own slice to grpo, rloo, gpg as mean=, std=, count=.

    Args:
        rewards: fp32 or fp64 [S], a constant.
        group_ids: integers [S]; rollouts of one prompt share one.
        unbiased: whether std is over n - 1, or over n.
        singleton: as for tokenrl.advantages.grpo.
        unscored: as for tokenrl.advantages.grpo.
    """
    x = as_rewards(rewards, unscored=unscored)
    return statistics_of(x, as_groups(group_ids, x, unscored), unbiased, singleton)


def moments(x: Tensor, weight: Tensor, unbiased: bool = True, unscored: str = "raise") -> tuple[Tensor, Tensor]:
    """0-d mean and variance of x, every entry counted weight times; variance 0 where the denominator would be 0.
    unscored: "nan", entries that are NaN do not count."""
    if unscored == "nan":
        x, weight = (torch.where(x.isnan(), 0.0, y) for y in (x, weight))
    everyone = Groups(torch.zeros_like(x, dtype=torch.int64), 1)
    # The empty batch has no first entry to read the statistics from; it has nothing to scale either.
    mean = everyone.mean(x, weight)[:1].sum()
    over = (weight.sum() - (1 if unbiased else 0)).clamp(min=1)
    return mean, (weight * (x - mean) ** 2).sum() / over
