"""Advantages per sequence from the rewards of its group, without gradient (see tokenrl/advantages/__init__.py)."""

from typing import Any

import torch
from torch import Tensor

from ..batch.checks import as_float64, as_lengths, as_rewards, check_floats, check_name, check_number, check_tensor
from ..batch.groups import as_groups, moments, statistics_of
from ..errors import wrong
from .per_token import discounted_returns

SCALES = ("std", "none", "batch")
PAMA_FORMS = ("signed", "noon")


def grpo(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    scale: str = "std",
    eps: float = 1e-6,
    unbiased: bool = True,
    singleton: str = "raw",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    unscored: str = "raise",
) -> Tensor:
    """GRPO, A = (R - mean_g) / (std_g + eps): [S] -> [S].

    Args:
        rewards: fp32 or fp64 [S], a constant.
        group_ids: integers [S]; rollouts of one prompt share one. None with mean and std, or with mean and scale
            "none".
        scale: "std"; "none", Dr.GRPO, A = R - mean_g; "batch", std of all rewards of the call (TRL; LitePPO of ROLL).
        eps: added to the std: verl's 1e-6, TRL has 1e-4.
        unbiased: whether the std is over n - 1 (verl, TRL), or over n.
        singleton: of a group of one: "raw", it has mean 0 and std 1, so keeps its reward; "zero", its advantage is 0.
        mean: [S], in place of the mean of the rows of this call (group_statistics gives it).
        std: [S], in place of their std.
        unscored: of a NaN among the rewards: "raise", or "nan", the advantage of that row, which no statistic sees.

    Source: verl core_algos, TRL; Dr.GRPO, arXiv 2503.20783 (trainers).
    """
    check_name("scale", scale, SCALES)
    check_number("eps", eps, 0)
    x = as_rewards(rewards, unscored=unscored)
    own: Any = None
    if mean is None or (std is None and scale == "std"):
        own = statistics_of(x, as_groups(group_ids, x, unscored), unbiased, singleton)
    centred = x - (own.mean if mean is None else as_float64("mean", mean, x.shape, x))
    if scale == "none":
        return centred.to(rewards.dtype)
    if std is not None:
        width = as_float64("std", std, x.shape, x)
    else:
        width = own.std if scale == "std" else moments(x, torch.ones_like(x), unbiased, unscored)[1].sqrt()
    return (centred / (width + eps)).to(rewards.dtype)


def rloo(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    singleton: str = "zero",
    mean: Tensor | None = None,
    count: Tensor | None = None,
    unscored: str = "raise",
) -> Tensor:
    """RLOO, A = R - mean of the others = n / (n - 1) (R - mean_g): [S] -> [S].

    Args:
        rewards: fp32 or fp64 [S], a constant.
        group_ids: integers [S]; rollouts of one prompt share one. None with mean and count.
        singleton: of a group of one: "zero" as verl's rloo_vectorized, "raw", it keeps its reward, as its rloo.
        mean: [S], the mean of the whole group, with count.
        count: [S], floats, n of the whole group, with mean.
        unscored: as for grpo.

    Source: arXiv 2402.14740, verl (trainers).
    """
    x = as_rewards(rewards, unscored=unscored)
    if (mean is None) != (count is None):
        raise wrong("count" if count is None else "mean", None, "both of mean and count, or neither")
    if mean is None or count is None:
        mean, _, count = statistics_of(x, as_groups(group_ids, x, unscored), True, singleton)
    n, centred = as_float64("count", count, x.shape, x), x - as_float64("mean", mean, x.shape, x)
    return (torch.where(n > 1, n / (n - 1), 1.0) * centred).to(rewards.dtype)


def opo(
    rewards: Tensor, lengths: Tensor, group_ids: Tensor, *, singleton: str = "raw", unscored: str = "raise"
) -> Tensor:
    """OPO, A = R - sum_i n_i R_i / sum_i n_i of the group: [S], lengths n [S] -> [S].

    Groups without a token stay finite (our reading; verl: NaN).

    Args:
        rewards: fp32 or fp64 [S], a constant.
        lengths: integers [S], tokens of each response, at least 0.
        group_ids: integers [S]; rollouts of one prompt share one.
        singleton: as for grpo.
        unscored: as for grpo.

    Source: arXiv 2505.23585, verl (trainers).
    """
    x, groups = as_rewards(rewards, unscored=unscored), as_groups(group_ids, rewards, unscored)
    single = statistics_of(x, groups, True, singleton)
    baseline = torch.where(single.count > 1, groups.mean(x, as_lengths(lengths, x)), single.mean)
    return (x - baseline).to(rewards.dtype)


def remax(rewards: Tensor, greedy_rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """ReMax, A = R - R_greedy: [S], [S] -> [S].

    With rewards [B, T] and mask, as verl: A_t = sum_{j >= t} r_j - R_greedy over valid tokens, [B, T].

    Args:
        rewards: fp32 or fp64 [S], or of each token, [B, T]; a constant.
        greedy_rewards: fp32 or fp64 [S] or [B]: what the greedy response to the same prompt got.
        mask: bool [B, T], beside rewards of tokens.

    Source: arXiv 2310.10505, verl (trainers).
    """
    check_tensor("rewards", rewards)
    if rewards.dim() == 1:
        x = as_rewards(rewards)
        return (x - as_float64("greedy_rewards", greedy_rewards, x.shape, x)).to(rewards.dtype)
    to_go = discounted_returns(rewards, mask).double()
    greedy = as_float64("greedy_rewards", greedy_rewards, rewards.shape[:1], rewards)[:, None]
    return (to_go - (greedy if mask is None else torch.where(mask, greedy, 0.0))).to(rewards.dtype)


def gpg(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    f_norm: float = 1.0,
    alpha: float | None = None,
    singleton: str = "raw",
    mean: Tensor | None = None,
    unscored: str = "raise",
) -> Tensor:
    """GPG, A = alpha (R - mean_g) / f_norm: [S] -> [S].

    Args:
        rewards: fp32 or fp64 [S], a constant.
        group_ids: integers [S]; rollouts of one prompt share one. None with mean.
        f_norm: what is divided by, above 0.
        alpha: None: S / max(rewards that are not 0, 1) of the call. As verl has it, this counts values, not groups, so
            it means what the paper says for rewards of 0 and 1 only.
        singleton: as for grpo.
        mean: [S], in place of the mean of the rows of this call.
        unscored: as for grpo.

    Source: arXiv 2504.02546, verl (trainers).
    """
    check_number("f_norm", f_norm, above=0)
    if alpha is not None:
        check_number("alpha", alpha)
    x = as_rewards(rewards, unscored=unscored)
    own = statistics_of(x, as_groups(group_ids, x, unscored), True, singleton).mean if mean is None else mean
    scored = x[~x.isnan()] if unscored == "nan" else x
    factor = scored.numel() / (scored != 0).double().sum().clamp(min=1) if alpha is None else alpha
    return (factor * (x - as_float64("mean", own, x.shape, x)) / f_norm).to(rewards.dtype)


def pass_at_k(
    rewards: Tensor, group_ids: Tensor, *, scale: str = "std", eps: float = 1e-6, unscored: str = "raise"
) -> Tensor:
    """A = r_max - r_2nd for the best rollout of a group, 0 for the others: [S] -> [S].

    A shared maximum gives 0; so does a group of one (our reading; verl raises).

    Args:
        rewards: fp32 or fp64 [S], a constant.
        group_ids: integers [S]; rollouts of one prompt share one.
        scale: "std" divides by std_g + eps, over n - 1; "none" does not.
        eps: at least 0.
        unscored: as for grpo.

    Source: arXiv 2503.19595, verl grpo_passk (trainers).
    """
    check_name("scale", scale, SCALES[:2])
    check_number("eps", eps, 0)
    x, groups = as_rewards(rewards, unscored=unscored), as_groups(group_ids, rewards, unscored)
    statistics = statistics_of(x, groups, True, "zero")
    alone, second = groups.top_two(x)
    gap = torch.where(alone & (statistics.count > 1), x - second, 0.0)
    gap = torch.where(statistics.mean.isnan(), torch.nan, gap)
    return (gap / (statistics.std + eps) if scale == "std" else gap).to(rewards.dtype)


def gdpo(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    weights: Tensor | None = None,
    lengths: Tensor | None = None,
    eps: float = 1e-6,
    singleton: str = "raw",
    unscored: str = "raise",
) -> Tensor:
    """GDPO, whitened sum_k w_k (R_k - mean_gk) / (std_gk + eps): [S, K], weights [K] -> [S].

    Whitening is (x - mean) / sqrt(var + 1e-8), variance over n - 1.

    Args:
        rewards: fp32 or fp64 [S, K], of K kinds, a constant.
        group_ids: integers [S]; rollouts of one prompt share one.
        weights: [K], w; None: 1 each.
        lengths: integers [S]: whitening is over tokens, each sequence counts n_i times (verl); None: over sequences
            (TRL, which has / (std + 1e-4)).
        eps: added to each std_gk.
        singleton: as for grpo.
        unscored: as for grpo.

    Source: arXiv 2601.05242, verl, TRL (trainers).
    """
    check_number("eps", eps, 0)
    x = as_rewards(rewards, dims="[S, K]", unscored=unscored)
    groups, w = as_groups(group_ids, x, unscored), x.new_ones(x.shape[1])
    if weights is not None:
        w = as_float64("weights", weights, w.shape, x)
    total = torch.zeros_like(x[:, 0])
    for k, reward in enumerate(x.unbind(1)):
        own = statistics_of(reward, groups, True, singleton)
        total += w[k] * (reward - own.mean) / (own.std + eps)
    count = torch.ones_like(total) if lengths is None else as_lengths(lengths, x)
    mean, var = moments(total, count, unscored=unscored)
    return ((total - mean) * (var + 1e-8).rsqrt()).to(rewards.dtype)


def pama(advantages: Tensor, *, form: str = "signed") -> Tensor:
    """PAMA, of advantages under K objectives, [..., K], the one [...] that serves them all: the smallest
    |sum_k c_k A_k| of convex weights c, with its sign.

        "signed"   clip(0, min_k A_k, max_k A_k): 0 where signs differ, else the value nearest to 0
        "noon"     min_k max(A_k, 0), the paper's surrogate

    Of sequences or of tokens, for policy_loss.

    Args:
        advantages: fp32 or fp64 [..., K], K >= 1; no gradient passes.
        form: "signed" or "noon", as above.

    Source: arXiv 2508.07768 (notes).
    """
    check_floats("advantages", advantages)
    check_name("form", form, PAMA_FORMS)
    if advantages.dim() == 0 or advantages.shape[-1] == 0:
        raise wrong("advantages", f"shape {list(advantages.shape)}", "[..., K], one of each of K objectives, K >= 1")
    low, high = advantages.detach().aminmax(dim=-1)
    return low.clamp(min=0) if form == "noon" else torch.zeros_like(low).clamp(low, high)
