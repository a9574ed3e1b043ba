"""Advantages per sequence from other baselines than the mean of the group, without gradient (see
tokenrl/advantages/__init__.py): MaxRL, OPMD, AsymRE, RAE."""

import torch
from torch import Tensor

from ..batch.checks import as_rewards, check_integers, check_name, check_number, values_known
from ..batch.groups import SINGLETONS, as_groups, statistics_of
from ..batch.layout import Layout
from ..batch.valid_tokens import ValidTokens
from ..errors import wrong

BASELINES = ("mean", "soft")


def maxrl(
    rewards: Tensor, group_ids: Tensor, *, eps: float = 0.0, singleton: str = "zero", unscored: str = "raise"
) -> Tensor:
    """MaxRL, A = (R - mean_g) / (mean_g + eps), 0 where mean_g <= 0: [S] -> [S].

    For rewards that are not negative.

    Args:
        rewards: fp32 or fp64 [S], at least 0, a constant.
        group_ids: integers [S]; rollouts of one prompt share one.
        eps: of the divisor: 0 in prime-rl, 1e-6 in SkyRL.
        singleton: "zero", a group of one has an advantage of 0; "raw", it keeps its reward (SkyRL).
        unscored: of a NaN among the rewards: "raise", or "nan", the advantage of that row, which no statistic sees.

    Source: arXiv 2602.02710, prime-rl, SkyRL (trainers).
    """
    check_number("eps", eps, 0)
    check_name("singleton", singleton, SINGLETONS)
    x, groups = as_rewards(rewards, unscored=unscored), as_groups(group_ids, rewards, unscored)
    own = statistics_of(x, groups, True, "zero")
    found = torch.where(own.mean <= 0, 0, (x - own.mean) / (own.mean + eps))
    return (torch.where(own.count == 1, x, found) if singleton == "raw" else found).to(rewards.dtype)


def soft_value(rewards: Tensor, group_ids: Tensor, *, tau: float = 1.0, unscored: str = "raise") -> Tensor:
    """tau log mean_g exp(R / tau), between the mean and the maximum of the group: [S] -> [S].

    OPMD's other baseline, and A*PO's optimal value V*, of samples of the reference policy with tau = 0.5.

    Args:
        rewards: fp32 or fp64 [S], a constant.
        group_ids: integers [S]; rollouts of one prompt share one.
        tau: temperature, above 0, in units of the reward: 0 would be the maximum, infinity the mean.
        unscored: as for maxrl.

    Source: OPMD, Trinity-RFT; A*PO, arXiv 2505.20686, TRL (trainers).
    """
    check_number("tau", tau, above=0)
    x, groups = as_rewards(rewards, unscored=unscored), as_groups(group_ids, rewards, unscored)
    highest = groups.max(x)
    mean = groups.mean(((x - highest) / tau).exp(), torch.ones_like(x))
    return (highest + tau * mean.log()).to(rewards.dtype)


def opmd(
    rewards: Tensor, group_ids: Tensor, *, baseline: str = "mean", tau: float = 1.0, unscored: str = "raise"
) -> Tensor:
    """OPMD, A = R - b_g: [S] -> [S], for objective "opmd". A group of one has b = 0.

    Args:
        rewards: fp32 or fp64 [S], a constant.
        group_ids: integers [S]; rollouts of one prompt share one.
        baseline: b_g, "mean" of the group, or "soft", its soft_value.
        tau: of soft_value, above 0.
        unscored: as for maxrl.

    Source: Trinity-RFT (trainers).
    """
    check_name("baseline", baseline, BASELINES)
    check_number("tau", tau, above=0)
    x, groups = as_rewards(rewards, unscored=unscored), as_groups(group_ids, rewards, unscored)
    own = statistics_of(x, groups, True, "raw")
    if baseline == "mean":
        return (x - own.mean).to(rewards.dtype)
    soft = soft_value(x, group_ids, tau=tau, unscored=unscored)
    return (x - torch.where(own.count == 1, 0, soft)).to(rewards.dtype)


def asymre(rewards: Tensor, group_ids: Tensor, *, shift: float = -0.1, unscored: str = "raise") -> Tensor:
    """AsymRE, A = R - (mean_g + shift), a group of one A = R: [S] -> [S]. For objective "reinforce".

    Below 0 the shift has the policy learn more from what went well than from what did not.

    Args:
        rewards: fp32 or fp64 [S], a constant.
        group_ids: integers [S]; rollouts of one prompt share one.
        shift: added to the baseline, in units of the reward.
        unscored: as for maxrl.

    Source: arXiv 2506.20520, Trinity-RFT (trainers).
    """
    check_number("shift", shift)
    x, groups = as_rewards(rewards, unscored=unscored), as_groups(group_ids, rewards, unscored)
    own = statistics_of(x, groups, True, "raw")
    return (x - torch.where(own.count == 1, own.mean, own.mean + shift)).to(rewards.dtype)


def rae(rewards: Tensor, agents: Tensor, baselines: Tensor, *, decay: float = 0.95) -> tuple[Tensor, Tensor]:
    """RAE, A = R - b of the agent (or role) that earned it; then b <- decay b + (1 - decay) R, sequence by sequence in
    order: ([S], the baselines for the next call [K], fp64).

    Args:
        rewards: fp32 or fp64 [S], a constant, in the order in which they were earned.
        agents: integers [S] in [0, K), whose reward it is.
        baselines: fp32 or fp64 [K], b before the call; zeros at first.
        decay: in [0, 1], of a baseline at each of its rewards; 0.95 is our reading of SPIRAL.

    Source: SPIRAL, arXiv 2506.24119, prime-rl (trainers).
    """
    check_number("decay", decay, 0, 1)
    x = as_rewards(rewards, unscored="raise")
    state = as_rewards(baselines, name="baselines", dims="[K]")
    check_integers("agents", agents)
    if agents.shape != x.shape or not agents.device == x.device == state.device:
        given = f"{list(agents.shape)} on {agents.device}, beside baselines on {state.device}"
        raise wrong("agents", given, f"{list(x.shape)}, all on {x.device}")
    if values_known(agents) and ((agents < 0) | (agents >= state.numel())).any():
        raise wrong("agents", f"{agents.min()} to {agents.max()}", f"numbers of baselines, [0, {state.numel()})")
    agents = agents.long()
    counts = torch.zeros_like(state).index_add_(0, agents, torch.ones_like(x))
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).long()
    order = agents.argsort(stable=True)
    cells, agent, own = torch.arange(x.numel(), device=x.device), agents[order], x[order]
    backwards = ValidTokens(Layout(x.shape, ends, None, None), cells, agent.flip(0))
    sums = backwards.suffix_sums(own.flip(0), decay)  # sum_{j <= i} decay^(i - j) R_j of the agent, the last i first
    seen, earlier = sums.flip(0), backwards.following(sums).flip(0)
    before = decay ** (cells - ends[agent]).double() * state[agent] + (1 - decay) * earlier
    advantages = torch.empty_like(x).index_copy_(0, order, own - before)
    last = torch.where(counts > 0, torch.cat([seen.new_zeros(1), seen])[ends[1:]], 0)
    return advantages.to(rewards.dtype), decay**counts * state + (1 - decay) * last
