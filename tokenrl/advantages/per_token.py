"""Advantages over valid tokens, without gradient: returns, whitening, GAE, the optimal token baseline."""

from dataclasses import replace

import torch
from torch import Tensor

from ..batch.checks import as_rewards, as_scalar, check_name, check_number, check_scored, values_known
from ..batch.groups import as_groups, groups_of, moments, statistics_of
from ..batch.valid_tokens import HOLES, ValidTokens, per_token, valid_of, valid_tokens
from ..errors import wrong

POSITIONS = ("column", "valid")


def _discount(name: str, x: float | Tensor, valid: ValidTokens) -> float | Tensor:
    """A number, or [M] of one per row."""
    if not isinstance(x, Tensor):
        check_number(name, x, 0, 1)
        return x
    found = per_token(name, x, valid)
    if values_known(found) and not ((found >= 0) & (found <= 1)).all():
        raise wrong(name, f"{x.min()} to {x.max()} in the tensor", "numbers in [0, 1]")
    return found


def _whitened(
    x: Tensor, unscored: str, mean: Tensor | float | None = None, var: Tensor | float | None = None, eps: float = 1e-8
) -> Tensor:
    if (mean is None) != (var is None):
        raise wrong("var" if var is None else "mean", None, "both of mean and var, or neither")
    check_number("eps", eps, 0)
    if mean is None or var is None:
        mean, var = moments(x, torch.ones_like(x), unscored=unscored)
    return (x - as_scalar("mean", mean, x)) * (as_scalar("var", var, x) + eps).rsqrt()


def whiten(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    mean: Tensor | float | None = None,
    var: Tensor | float | None = None,
    eps: float = 1e-8,
    unscored: str = "raise",
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over all valid tokens, variance over N - 1: [B, T] -> [B, T]. One token gives 0 (our
    reading; verl raises, and adds 1e-8 to N).

    Args:
        values: fp32 or fp64 [B, T], or [N] with cu_seqlens; a constant.
        mask: bool of that shape; masked cells may hold anything and are 0.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        mean: a number or 0-d, of a larger batch, with var.
        var: likewise, its variance.
        eps: at least 0.
        unscored: of a NaN among valid values: "raise", or "nan", which the statistics leave out.

    Source: verl masked_whiten (trainers).
    """
    valid = valid_of(values, mask, cu_seqlens, "values")
    x = _taken(valid, "values", values, unscored)
    return valid.put(_whitened(x, unscored, mean, var, eps), values.dtype)


def _taken(valid: ValidTokens, name: str, x: Tensor, unscored: str) -> Tensor:
    taken = valid.take(name, x)
    check_scored(name, taken, unscored)
    return taken


def discounted_returns(
    token_rewards: Tensor, mask: Tensor | None = None, gamma: float | Tensor = 1.0, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """G_t = r_t + gamma G_{t+1} over valid tokens: [B, T] -> [B, T]. A masked cell costs no discount (verl).

    Args:
        token_rewards: fp32 or fp64 [B, T], or [N] with cu_seqlens; a constant.
        mask: bool of that shape; masked cells may hold anything and are 0.
        gamma: in [0, 1], a number, or one per sequence, [S].
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    valid = valid_of(token_rewards, mask, cu_seqlens, "token_rewards")
    gamma = _discount("gamma", gamma, valid)
    return valid.put(valid.suffix_sums(valid.take("token_rewards", token_rewards), gamma), token_rewards.dtype)


def reinforce_plus_plus(
    token_rewards: Tensor,
    mask: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    *,
    cu_seqlens: Tensor | None = None,
    unscored: str = "raise",
) -> Tensor:
    """REINFORCE++, discounted_returns whitened over all valid tokens: [B, T] -> [B, T].

    Args:
        token_rewards: fp32 or fp64 [B, T], or [N] with cu_seqlens; a constant.
        mask: bool of that shape; masked cells may hold anything and are 0.
        gamma: in [0, 1], a number, or one per sequence, [S].
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        unscored: as for whiten.

    Source: arXiv 2501.03262, verl (trainers).
    """
    valid = valid_of(token_rewards, mask, cu_seqlens, "token_rewards")
    gamma = _discount("gamma", gamma, valid)
    returns = valid.suffix_sums(_taken(valid, "token_rewards", token_rewards, unscored), gamma)
    return valid.put(_whitened(returns, unscored), token_rewards.dtype)


def reinforce_plus_plus_baseline(
    rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    singleton: str = "raw",
    unscored: str = "raise",
) -> Tensor:
    """R - mean_g on every token of a sequence, whitened over all valid tokens: [S], mask [B, T] -> [B, T].

    Args:
        rewards: fp32 or fp64 [S], a constant.
        group_ids: integers [S]; rollouts of one prompt share one.
        mask: bool [B, T], or [N] with cu_seqlens: the shape of the result.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        singleton: as for grpo.
        unscored: as for grpo.

    Source: arXiv 2501.03262, verl (trainers).
    """
    x, valid = as_rewards(rewards, unscored=unscored), valid_of(mask, mask, cu_seqlens, "mask")
    valid.layout.flat_sequences("rewards", rewards, x.dtype)
    centred = x - statistics_of(x, as_groups(group_ids, x, unscored), True, singleton).mean
    return valid.put(_whitened(centred[valid.row], unscored), rewards.dtype)


def gae(
    token_rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    whiten: bool = True,
    *,
    holes: str = "skip",
    cu_seqlens: Tensor | None = None,
    unscored: str = "raise",
) -> tuple[Tensor, Tensor]:
    """GAE over valid tokens: (advantages, returns), [B, T] each.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, returns = A + V; V = A = 0 after the last.

    Args:
        token_rewards: fp32 or fp64 [B, T], or [N] with cu_seqlens; a constant.
        values: V, of that shape.
        mask: bool of that shape; masked cells may hold anything and are 0.
        gamma: in [0, 1], a number, or one per sequence, [S].
        lam: likewise, as VAPO's lambda of 1 - 1 / (alpha n).
        whiten: the advantages only, over all tokens.
        holes: "skip", t + 1 is the next valid token, so a tool's output costs no discount; "count", it is the next
            cell, and a masked one has r = V = 0 (OpenRLHF, and the code of RTO's authors).
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        unscored: as for whiten, of token_rewards.

    Source: arXiv 1506.02438, verl (trainers).
    """
    check_name("holes", holes, HOLES)
    valid = valid_of(token_rewards, mask, cu_seqlens, "token_rewards")
    walked = valid if holes == "skip" else valid_tokens(replace(valid.layout, mask=None))
    gamma, lam = _discount("gamma", gamma, walked), _discount("lam", lam, walked)
    r, v = (
        walked.take(name, valid.put(x, torch.float64))
        for name, x in (
            ("token_rewards", _taken(valid, "token_rewards", token_rewards, unscored)),
            ("values", valid.take("values", values)),
        )
    )
    a = walked.suffix_sums(r + gamma * walked.following(v) - v, gamma * lam)
    a, v = (x if walked is valid else x[valid.cells] for x in (a, v))
    out = _whitened(a, unscored) if whiten else a
    return valid.put(out, token_rewards.dtype), valid.put(a + v, token_rewards.dtype)


def otb(
    token_rewards: Tensor,
    group_ids: Tensor,
    logp: Tensor,
    sum_pi_squared: Tensor,
    mask: Tensor | None = None,
    *,
    is_weights: Tensor | None = None,
    position: str = "column",
    zero_tail: bool = True,
    eps: float = 1e-8,
    cu_seqlens: Tensor | None = None,
    unscored: str = "raise",
) -> Tensor:
    """Optimal token baseline, A_t = G_t - sum_i G_t W_t / (sum_i W_t + eps) over the group's tokens at t: [B, T].

    G: undiscounted returns. W_t = sum_{j <= t} (1 - 2 pi_j + sum_pi_squared_j) is_weights_j^2 over valid tokens. No
    baseline for a sequence alone in its group; sequences without tokens do not count (our reading).

    Args:
        token_rewards: fp32 or fp64 [B, T], or [N] with cu_seqlens; a constant, as all of the tokens are.
        group_ids: integers [S]; rollouts of one prompt share one.
        logp: log pi of the sampled tokens, of that shape.
        sum_pi_squared: sum_v p_v^2, of that shape: exp of log_sum_sq_probs of token_logprobs.
        mask: bool of that shape; masked cells may hold anything and are 0.
        is_weights: of that shape; None: 1.
        position: what t is, "column" (verl optimal_token_baseline) or the count of valid tokens, "valid" (its
            multi-turn one).
        zero_tail: no baseline for the longest sequence past the length of the second.
        eps: added to the divisor.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        unscored: as for whiten, of token_rewards.

    Source: verl (trainers).
    """
    check_name("position", position, POSITIONS)
    check_number("eps", eps, 0)
    valid = valid_of(token_rewards, mask, cu_seqlens, "token_rewards")
    row, returns = valid.row, valid.suffix_sums(_taken(valid, "token_rewards", token_rewards, unscored), 1.0)
    w = 1 - 2 * valid.take("logp", logp).exp() + valid.take("sum_pi_squared", sum_pi_squared)
    w = w if is_weights is None else w * valid.take("is_weights", is_weights) ** 2
    w = ValidTokens(valid.layout, valid.cells, row.flip(0)).suffix_sums(w.flip(0), 1.0).flip(0)
    t = valid.cells - valid.layout.cu_seqlens[row]
    lengths = returns.new_zeros(valid.layout.num_sequences).index_add_(0, row, torch.ones_like(returns))
    if position == "valid":
        t = torch.arange(row.numel(), device=row.device) - (lengths.cumsum(0) - lengths)[row].long()
    groups = as_groups(group_ids, torch.zeros_like(lengths).index_add_(0, row, returns), unscored)
    # One id for each pair of group and position: positions lie below the number of tokens.
    pairs = groups_of(groups.index[row] * valid.layout.num_tokens + t)
    baseline = pairs.sum(returns * w) / (pairs.sum(w) + eps)
    alone, second = groups.top_two(lengths)
    bare = groups.sum((lengths > 0).double())[row] < 2
    bare |= zero_tail & alone[row] & (t >= second[row])
    return valid.put(torch.where(bare, returns, returns - baseline), token_rewards.dtype)
