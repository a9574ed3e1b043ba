"""Rewards made of lengths and log-probs, without gradient, for the estimators of tokenrl.advantages.

Results that come of integers alone are fp32, fp64 where that is torch's default dtype.
"""

import torch
from torch import Tensor

from ..batch.checks import as_float64, as_lengths, as_rewards, check_number, check_tensor
from ..batch.valid_tokens import valid_of
from ..errors import wrong
from ..objectives.policy import kl_estimator


def token_rewards(
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor | None = None,
    *,
    beta: float = 0.1,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The reward that a preference-trained policy gives each token: [B, T] of logp's dtype, or [N] with cu_seqlens.

        beta (logp_t - ref_logp_t) = r(s_t, y_t) + V*(s_t+1) - V*(s_t),  V*(s) = beta logsumexp Q*(s, .) / beta

    a reward shaped by a potential, whose sum over a sequence is DPO's. With beta times the logits for Q*(s, .), V*(s)
    is beta times the lse of token_logprobs, both up to a number per state. For credit maps, search, or as the
    token_rewards of gae.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, of the policy, a constant.
        ref_logp: of its reference, of that shape.
        mask: bool of that shape; masked cells may hold anything and are 0.
        beta: above 0.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.

    Source: arXiv 2404.12358 (notes).
    """
    check_number("beta", beta, above=0)
    valid = valid_of(logp, mask, cu_seqlens, "logp")
    policy, reference = (valid.take(name, x) for name, x in (("logp", logp), ("ref_logp", ref_logp)))
    return valid.put(beta * (policy - reference), logp.dtype)


def rto(
    dpo_logp: Tensor,
    ref_logp: Tensor,
    old_logp: Tensor,
    rewards: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 0.05,
    clip: float | None = 0.05,
    kl_coef: float = 0.01,
    reward_clip: float | None = 10.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """RTO, token rewards for gae: [B, T] of old_logp's dtype, or [N] with cu_seqlens.

        r_t = clamp(scale (dpo_logp - ref_logp), +-clip) - kl_coef (old_logp - ref_logp)
              + clamp(rewards, +-reward_clip) on the last valid token

    A response without tokens gets none of its reward. The authors' GAE is gae(r, values, mask, 1.0, 0.95, whiten=False,
    holes="count").

    Args:
        dpo_logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, of a DPO policy, a constant.
        ref_logp: of its reference, of that shape.
        old_logp: of the sampling policy, of that shape.
        rewards: [S], of the responses.
        mask: bool of that shape; masked cells may hold anything and are 0.
        scale: of the DPO policy's reward of a token.
        clip: its largest size, above 0; None: no bound.
        kl_coef: at least 0, in units of the reward per nat.
        reward_clip: the largest size of a response's reward, above 0; None: no bound.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.

    Source: arXiv 2404.18922 (authors' code).
    """
    for name, bound in (("clip", clip), ("reward_clip", reward_clip)):
        if bound is not None:
            check_number(name, bound, above=0, accepted="a positive number, or None")
    check_number("kl_coef", kl_coef, 0)
    check_number("scale", scale)
    valid = valid_of(old_logp, mask, cu_seqlens, "old_logp")
    dpo, ref, old = (
        valid.take(name, x) for name, x in (("dpo_logp", dpo_logp), ("ref_logp", ref_logp), ("old_logp", old_logp))
    )
    final = as_float64("rewards", rewards, (valid.layout.num_sequences,), old_logp)
    last = valid.following(torch.ones_like(old)) == 0
    r = _clamped(scale * (dpo - ref), clip) - kl_coef * (old - ref)
    return valid.put(r + torch.where(last, _clamped(final, reward_clip)[valid.row], 0.0), old_logp.dtype)


def _clamped(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(-bound, bound)


def _float_dtype() -> torch.dtype:
    """Of rewards; a model's default of 16 bits would round them, and no estimator would take them."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def _float_lengths(lengths: Tensor) -> Tensor:
    check_tensor("lengths", lengths)
    if lengths.dim() != 1:
        raise wrong("lengths", f"shape {list(lengths.shape)}", "[S], one per sequence")
    return as_lengths(lengths, lengths)


def kl_estimate(
    logp: Tensor, ref_logp: Tensor, mask: Tensor | None = None, *, kl: str = "kl_k1", cu_seqlens: Tensor | None = None
) -> Tensor:
    """The estimate of KL(pi || ref) of each token, of logp's shape and dtype, for a KL in the reward: r - coef kl.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, of the sampling policy, a constant.
        ref_logp: of the reference, of that shape.
        mask: bool of that shape; masked cells may hold anything and are 0.
        kl: a row kl_* of the table of objectives, with its formula and clamp; verl's use_kl_in_reward has "kl_k1".
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    row = kl_estimator(kl)
    valid = valid_of(logp, mask, cu_seqlens, "logp")
    own, ref = valid.take("logp", logp), valid.take("ref_logp", ref_logp)
    x = (own - ref).clamp(-row.clamp, row.clamp)
    return valid.put(row.gate.value(x, x, own, torch.zeros_like(x), torch.ones_like(x)), logp.dtype)


def overlong_penalty(
    lengths: Tensor, *, max_length: int, buffer: int, factor: float = 1.0, floor: float | None = -1.0
) -> Tensor:
    """DAPO's soft overlong punishment, to be added to the rewards: integers n [S] -> [S].

    factor max(min((max_length - buffer - n) / buffer, 0), floor): 0 up to max_length - buffer, then linear down to
    -factor at max_length.

    Args:
        lengths: integers [S], n, tokens of the responses.
        max_length: tokens.
        buffer: tokens, above 0, at most max_length.
        factor: in units of the reward.
        floor: at most 0: the paper's -1; None for verl, which goes on falling beyond max_length.

    Source: arXiv 2503.14476 (paper); verl (trainers).
    """
    check_number("max_length", max_length)
    accepted = f"a number above 0 and at most max_length, {max_length}"
    check_number("buffer", buffer, most=max_length, above=0, accepted=accepted)
    check_number("factor", factor)
    if floor is not None:
        check_number("floor", floor, most=0, accepted="a number, at most 0, or None")
    over = (max_length - buffer - _float_lengths(lengths)) / buffer
    return (factor * over.clamp(min=floor, max=0.0)).to(_float_dtype())


def overlong_mask(lengths: Tensor, *, max_length: int, finished: Tensor | None = None) -> Tensor:
    """Overlong filtering: bool [S], False for the responses that were cut off, to be joined to the mask of the loss,
    mask & kept[:, None].

    Args:
        lengths: integers [S], tokens of the responses.
        max_length: tokens: a response of as many, or more, was cut off.
        finished: bool [S], unless it ended of itself, with an end-of-sequence token, as in TRL. None: none did.

    Source: DAPO, arXiv 2503.14476 (paper); TRL mask_truncated_completions, ms-swift overlong_filter (trainers).
    """
    check_number("max_length", max_length)
    kept = _float_lengths(lengths) < max_length
    if finished is None:
        return kept
    check_tensor("finished", finished)
    if finished.dtype != torch.bool or finished.shape != kept.shape:
        raise wrong("finished", f"{finished.dtype} {list(finished.shape)}", f"torch.bool {list(kept.shape)}")
    return kept | finished


def reasoning_budget(progress: float, *, initial: float = 800, minimum: int = 1, gamma: float = 0.2) -> int:
    """RMT's budget of thinking tokens, max(minimum, floor(initial gamma^progress)).

    Args:
        progress: the fraction of training done, in [0, 1].
        initial: tokens, of the budget at progress 0.
        minimum: tokens, at least 1.
        gamma: above 0, at most 1: what is left of the budget at progress 1.

    Source: arXiv 2509.24375 (notes).
    """
    check_number("progress", progress, 0, 1, accepted="a number in [0, 1]: step / steps")
    check_number("gamma", gamma, most=1, above=0)
    check_number("minimum", minimum, 1, accepted="an integer, at least 1")
    check_number("initial", initial)
    return max(minimum, int(initial * gamma**progress))


def length_reward(lengths: Tensor, budget: int, r_max: float) -> Tensor:
    """RMT's reward of a response's length, a triangle: r_max n / budget up to the budget, then down to 0 at twice the
    budget, and 0 beyond: integers n [S] -> [S].

    Args:
        lengths: integers [S], n, tokens of the responses.
        budget: tokens, above 0.
        r_max: the reward at the budget.

    Source: arXiv 2509.24375 (notes, which have no number for r_max).
    """
    check_number("budget", budget, above=0, accepted="a positive number")
    check_number("r_max", r_max)
    n = _float_lengths(lengths)
    return (r_max * (1 - (n / budget - 1).abs()).clamp(min=0.0)).to(_float_dtype())


def rmt_reward(correct: Tensor, length_rewards: Tensor, weight: float) -> Tensor:
    """RMT's reward, (1 - weight) correct + weight length_rewards: bool [S], fp32 or fp64 [S] -> [S].

    Args:
        correct: bool [S], whether the answer is right.
        length_rewards: fp32 or fp64 [S], of length_reward.
        weight: of these, in [0, 1].

    Source: arXiv 2509.24375 (notes, which have no number for weight).
    """
    check_number("weight", weight, 0, 1)
    check_tensor("correct", correct)
    extra = as_rewards(length_rewards, "length_rewards")
    if correct.dtype != torch.bool or correct.shape != extra.shape:
        raise wrong("correct", f"{correct.dtype} {list(correct.shape)}", f"torch.bool {list(extra.shape)}")
    return ((1 - weight) * correct.double() + weight * extra).to(length_rewards.dtype)
