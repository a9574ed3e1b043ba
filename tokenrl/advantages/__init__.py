"""Rewards -> advantages, without gradient: per sequence from the rewards of its group, per token by returns or GAE.

Sequence estimators take rewards [S] and group_ids [S] (any integers, in any order) and give [S]; token estimators take
[B, T] with a bool mask, or packed [N] with cu_seqlens [S + 1], and give the same shape, zero in masked cells (these may
hold anything). Sums run in fp64, results have the dtype of the rewards.

Groups must be whole in a call: mean and std are those of the rows it sees. A batch in parts hands in the statistics
instead (mean=, std=, count=, of group_statistics over all rows) and gets the same numbers; for token estimators
discounted_returns or gae(whiten=False), then whiten(mean=, var=).

A NaN is a reward that nobody gave. unscored="raise": an error (on a GPU, where a look at it were a sync, its whole
group or batch is NaN); "nan": the statistics are those of the scored rows (of GDPO those with all rewards), and what
depends on the NaN is NaN, to be masked.

A group of one has no baseline. singleton="raw": mean 0, std 1, so the reward itself (verl); "zero": the formula, 0
(TRL).
"""

from ..batch.groups import GroupStatistics, group_statistics
from ..methods.hapo import hapo
from ..methods.hapo import reward_statistics as hapo_statistics
from .baselines import asymre, maxrl, opmd, rae, soft_value
from .per_sequence import gdpo, gpg, grpo, opo, pama, pass_at_k, remax, rloo
from .per_token import discounted_returns, gae, otb, reinforce_plus_plus, reinforce_plus_plus_baseline, whiten
from .prefix_tree import prefix_values, tempo
from .segments import SpoCuts, SpoEdges, spo_chain, spo_cutpoints, spo_mask, spo_tree

__all__ = [
    "GroupStatistics",
    "SpoCuts",
    "SpoEdges",
    "asymre",
    "discounted_returns",
    "gae",
    "gdpo",
    "gpg",
    "group_statistics",
    "grpo",
    "hapo",
    "hapo_statistics",
    "maxrl",
    "opmd",
    "opo",
    "otb",
    "pama",
    "pass_at_k",
    "prefix_values",
    "rae",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "soft_value",
    "spo_chain",
    "spo_cutpoints",
    "spo_mask",
    "spo_tree",
    "tempo",
    "whiten",
]
