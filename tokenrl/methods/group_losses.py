"""Losses of whole sequences and of groups of them, which no sum over tokens is: TargetPO, GVPO, SPPO, A*PO, FlowRL.

    loss = gvpo_loss(logp, old_logp, advantages, group_ids, mask=mask)

Log-probs are fp32 or fp64, padded [B, T] with a bool mask, or packed [N] with cu_seqlens [S + 1], by token_logprobs or
linear_token_logprobs; masked cells may hold anything. What is given per sequence is [B] (or [S]). S and m are the sum
and the mean of a sequence's log-probs over its valid tokens, in fp64. logp alone gets a gradient (and log_z), which may
be differentiated again. Sequences without a token count nowhere. normalizer: what to divide by instead of the batch's
own number of sequences or of groups, a number or a 0-d tensor, so that parts that keep groups whole add up. Each
returns the loss, 0-d in the dtype of logp.
"""

import torch
from torch import Tensor

from ..batch.checks import as_float64, as_scalar, check_constant, check_floats, check_number, check_tensor
from ..batch.groups import Groups, as_groups
from ..batch.layout import Layout, layout_of
from ..batch.spans import spans_of

FLAT = 1e-6  # a standard deviation that is none


def target_po_loss(
    logp: Tensor,
    old_logp: Tensor,
    scores: Tensor,
    group_ids: Tensor,
    *,
    eta: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Mean over groups of -sum_i q_i log p_i, p = softmax(S), q = softmax(S_old + u / eta) over the group: the gradient
    in S_i is p_i - q_i.

    u: the scores of the group less their mean, over their standard deviation (of n) where that is above 1e-6. q is the
    same in every epoch over one batch, as S_old is.

    Args:
        logp: fp32 or fp64 [B, T], or packed [N] with cu_seqlens; it alone gets a gradient.
        old_logp: of that shape, of the policy that sampled.
        scores: fp32 or fp64 [S], such as rewards.
        group_ids: integers [S]; groups must be whole in a call.
        eta: temperature, above 0.
        mask: bool of that shape; masked cells may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        normalizer: what to divide by instead of the number of groups, a number above 0 or 0-d.

    Source: TargetPO, arXiv 2604.06159 (paper, authors' code).
    """
    check_number("eta", eta, above=0)
    layout, some = _layout(logp, mask, cu_seqlens)
    groups = _groups(group_ids, some)
    centred = _per_sequence("scores", scores, some)
    centred = centred - groups.mean(centred, some.double())
    std = groups.mean(centred.square(), some.double()).sqrt()
    target = _sums("old_logp", old_logp, layout) + torch.where(std > FLAT, centred / std, centred) / eta
    value = -_log_softmax(target, groups).exp() * _log_softmax(_sums("logp", logp, layout), groups)
    return _mean(value, some, groups.total(some.double()) > 0, normalizer).to(logp.dtype)


def gvpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    group_ids: Tensor,
    *,
    beta: float = 0.1,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Mean over groups of 1 / (2 (n - 1)) sum_i (R_i - sg[mean R] - A_i)^2, R = beta (S - S_old), n the group's size. A
    group of one has the factor 1 / 2 (our reading).

    Args:
        logp: fp32 or fp64 [B, T], or packed [N] with cu_seqlens; it alone gets a gradient.
        old_logp: of that shape, of the policy that sampled.
        advantages: fp32 or fp64 [S], A, rewards less the mean of their group.
        group_ids: integers [S]; groups must be whole in a call.
        beta: a number.
        mask: bool of that shape; masked cells may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        normalizer: as for target_po_loss; the recipe sums over the groups of a micro-batch: 1.

    Source: GVPO, arXiv 2504.19599 (authors' code, verl-recipe).
    """
    check_number("beta", beta)
    layout, some = _layout(logp, mask, cu_seqlens)
    groups = _groups(group_ids, some)
    reward = beta * _sums("logp", logp, layout, old_logp)
    size = groups.sum(some.double())
    error = reward - groups.mean(reward.detach(), some.double()) - _per_sequence("advantages", advantages, some)
    value = error.square() / (2 * (size - 1).clamp(min=1))
    return _mean(value, some, groups.total(some.double()) > 0, normalizer).to(logp.dtype)


def sppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    rewards: Tensor,
    *,
    eta: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Mean over sequences of (S - S_old - eta R)^2: self-play. Pairs of a winner and a loser have preference_loss.

    Args:
        logp: fp32 or fp64 [B, T], or packed [N] with cu_seqlens; it alone gets a gradient.
        old_logp: of that shape, of the policy that sampled.
        rewards: fp32 or fp64 [S], R, the win rate of a sequence against the policy less 1/2, or, as in verl-recipe, its
            reward less advantages.soft_value of the whole batch with tau = 1 / eta.
        eta: a number.
        mask: bool of that shape; masked cells may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        normalizer: what to divide by instead of the number of sequences, a number above 0 or 0-d.

    Source: arXiv 2405.00675, verl-recipe (trainers).
    """
    check_number("eta", eta)
    layout, some = _layout(logp, mask, cu_seqlens)
    error = _sums("logp", logp, layout, old_logp) - eta * _per_sequence("rewards", rewards, some)
    return _mean(error.square(), some, some, normalizer).to(logp.dtype)


def a_star_po_loss(
    logp: Tensor,
    ref_logp: Tensor,
    advantages: Tensor,
    *,
    beta: float = 1e-3,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Mean over sequences of (beta (S - S_ref) - A)^2, A = R - V*, V* the prompt's optimal value:
    advantages.soft_value(rewards, group_ids, tau=0.5) of eight samples of the reference policy.

    Args:
        logp: fp32 or fp64 [B, T], or packed [N] with cu_seqlens; it alone gets a gradient.
        ref_logp: of that shape, of the reference.
        advantages: fp32 or fp64 [S], A.
        beta: a number.
        mask: bool of that shape; masked cells may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        normalizer: as for sppo_loss.

    Source: arXiv 2505.20686, TRL 1.16's A2PO (trainers).
    """
    check_number("beta", beta)
    layout, some = _layout(logp, mask, cu_seqlens)
    error = beta * _sums("logp", logp, layout, ref_logp, "ref_logp") - _per_sequence("advantages", advantages, some)
    return _mean(error.square(), some, some, normalizer).to(logp.dtype)


def flowrl_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    rewards: Tensor,
    log_z: Tensor,
    *,
    beta: float = 15.0,
    ceiling: float = 10.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Mean over sequences of w (log_z + m - m_ref - beta R)^2, w = min(e^(S - S_old), ceiling), without gradient.

    Args:
        logp: fp32 or fp64 [B, T], or packed [N] with cu_seqlens.
        old_logp: of that shape, of the policy that sampled.
        ref_logp: of that shape, of the reference.
        rewards: fp32 or fp64 [S], R.
        log_z: fp32 or fp64 [S], the learned log-partition function of a sequence's prompt; it gets a gradient where it
            requires one.
        beta: a number.
        ceiling: at least 0, of the weight.
        mask: bool of that shape; masked cells may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        normalizer: as for sppo_loss.

    Source: FlowRL, arXiv 2509.15207, verl-recipe (authors' code).
    """
    check_number("beta", beta)
    check_number("ceiling", ceiling, 0)
    layout, some = _layout(logp, mask, cu_seqlens)
    check_floats("log_z", log_z)
    log_z = torch.where(some, layout.flat_sequences("log_z", log_z, torch.float64), 0)
    length = spans_of("sequence", layout).counts().clamp(min=1)
    moved = _sums("logp", logp, layout, ref_logp, "ref_logp") / length
    weight = _sums("logp", logp, layout, old_logp).detach().exp().clamp(max=ceiling)
    error = log_z + moved - beta * _per_sequence("rewards", rewards, some)
    return _mean(weight * error.square(), some, some, normalizer).to(logp.dtype)


def _layout(logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Layout, Tensor]:
    """The batch, and which of its sequences have tokens."""
    check_floats("logp", logp)
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    return layout, spans_of("sequence", layout).counts() > 0


def _sums(name: str, x: Tensor, layout: Layout, less: Tensor | None = None, less_name: str = "old_logp") -> Tensor:
    """fp64 [S] of x, or of x less a constant, over the valid tokens of each sequence."""
    check_floats(name, x)
    if name != "logp":
        check_constant(name, x)
    flat = layout.flat_tokens(name, x, torch.float64)
    if less is not None:
        check_floats(less_name, less)
        check_constant(less_name, less)
        flat = flat - layout.flat_tokens(less_name, less, torch.float64)
    return spans_of("sequence", layout).sum(torch.where(layout.valid(), flat, 0))


def _per_sequence(name: str, x: Tensor, some: Tensor) -> Tensor:
    """fp64 [S], 0 of sequences without a token."""
    check_tensor(name, x)
    return torch.where(some, as_float64(name, x, some.shape, some), 0)


def _groups(group_ids: Tensor, some: Tensor) -> Groups:
    """Sequences without a token are a group of their own."""
    groups = as_groups(group_ids, some)
    return Groups(torch.where(some, groups.index, groups.number), groups.number + 1)


def _log_softmax(x: Tensor, groups: Groups) -> Tensor:
    highest = groups.max(x.detach())
    return x - highest - groups.sum((x - highest).exp()).log()


def _mean(values: Tensor, some: Tensor, counted: Tensor, normalizer: float | Tensor | None) -> Tensor:
    """Of the sequences that have tokens, over the number of what is counted. The others have no part in it."""
    total = torch.where(some, values, 0).sum()
    if normalizer is None:
        return total / counted.sum().clamp(min=1)
    if not isinstance(normalizer, Tensor):
        check_number("normalizer", normalizer, above=0)
    return total / as_scalar("normalizer", normalizer, total)
