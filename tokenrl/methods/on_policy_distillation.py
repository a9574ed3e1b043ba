"""On-policy distillation by the tokens that the student sampled: what a teacher thinks of them as their advantages.

    A = teacher_advantages(logp, teacher_logp, mask=mask)                  # reverse KL, one sample per token
    loss, _ = tokenrl.policy_loss("ratio", new_logp, logp, A, mask=mask)   # or "ppo", "reinforce", any other row

E of teacher_logp - logp over the student's own tokens is -D(p || r), so that its policy gradient falls along the
reverse KL; only the teacher's log-probs of these tokens are needed, whose logits nobody holds. Log-probs are fp32 or
fp64, padded [B, T] with a bool mask, or packed [N] with cu_seqlens [S + 1]; results have their shape and dtype, are
without gradient and 0 in masked cells, which may hold anything.

What others call it:

    Thinking Machines, slime, ms-swift, Trinity    teacher_advantages, with the reward's advantages= where there is one
    verl, k1 with use_policy_gradient              teacher_advantages(limit=10) of the current log-probs, with
                                                   objective("ppo", dual=3)
    SDPO and SDFT of sampled tokens (TRL)          teacher_advantages of the current log-probs with "reinforce", and
                                                   token_weight=corrections.importance_weights(logp, old_logp, high=2)
    IW-OPD (TRL)                                   iw_opd_advantages with "reinforce"
    MiniLLM (TRL)                                  minillm_advantages with "grpo", plus distillation_loss("reverse_kd")
    ref_kl (prime-rl)                              teacher_advantages of the current log-probs with "ratio",
                                                   token_weight=kept_probability(logp, old_logp), and over all tokens
                                                   kl="kl_k2" to old_logp with kl_coef=0.002
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..batch.checks import check_name, check_number, check_tensor, values_known
from ..batch.valid_tokens import HOLES, ValidTokens, valid_of, valid_tokens
from ..errors import wrong


def teacher_advantages(
    logp: Tensor,
    teacher_logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages: Tensor | None = None,
    advantages_per: str | None = None,
    coef: float = 1.0,
    gamma: float = 0.0,
    holes: str = "skip",
    limit: float = float("inf"),
) -> Tensor:
    """A_t = advantages_t + coef sum_{i >= t} gamma^(i - t) (teacher_logp_i - logp_i), inside each sequence.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, of the student for the tokens that it sampled, theirs then or
            the current ones (detached).
        teacher_logp: of that shape, of the same tokens.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages: of the reward, [B] or one per token; None: 0.
        advantages_per: as for policy_loss.
        coef: a number.
        gamma: in [0, 1]: 0 takes the token's own difference alone (0^0 = 1).
        holes: "skip", a masked cell costs no discount; "count", it does (Tinker).
        limit: above 0, of the magnitude of the differences (verl: 10), in nats.

    Source: Thinking Machines' tinker-cookbook, slime, ms-swift, verl (authors' code, trainers).
    """
    check_number("coef", coef)
    check_number("limit", limit, above=0)
    valid, difference = _differences(logp, teacher_logp, mask, cu_seqlens)
    found = coef * _discounted(valid, difference.clamp(-limit, limit), gamma, holes)
    return valid.put(found + _of_reward(valid, advantages, advantages_per), logp.dtype)


def iw_opd_advantages(
    logp: Tensor,
    teacher_logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    gamma: float = 0.5,
    eps: float = 1e-8,
) -> Tensor:
    """w_t a_t, a_t = teacher_logp_t - logp_t, w_t = 1 + gamma (1 - sum_{i < t} |a_i| / max(sum_i |a_i|, eps)): early
    tokens, up to which the prefix is the teacher's too, weigh 1 + gamma, the last ones 1.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, of the rollout, or the current ones (detached) where nobody
            kept those.
        teacher_logp: of that shape, of the same tokens.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        gamma: at least 0.
        eps: above 0, in nats.

    Source: TRL 1.16's IW-OPD (trainers).
    """
    check_number("gamma", gamma, 0)
    check_number("eps", eps, above=0)
    valid, a = _differences(logp, teacher_logp, mask, cu_seqlens)
    total = a.new_zeros(valid.layout.num_sequences).index_add_(0, valid.row, a.abs())[valid.row]
    rest = valid.suffix_sums(a.abs(), 1.0)  # of the token and those behind it
    share = (total - rest) / total.clamp(min=eps)
    return valid.put((1 + gamma * (1 - share)) * a, logp.dtype)


def minillm_advantages(
    logp: Tensor,
    teacher_logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages: Tensor | None = None,
    advantages_per: str | None = None,
    gamma: float = 1.0,
    normalize_length: bool = True,
    compat: str | None = None,
) -> Tensor:
    """A_t = advantages_t + sum_{i >= t} gamma^(i - t) (teacher_logp_i - logp_i) / sum_{i >= t} gamma^(i - t), the
    reward to go, without the divisor where normalize_length is False. gamma 0: the token's own difference.

    The exact term of a single step, which the method adds, is distillation_loss("reverse_kd", logits, teacher_logits).

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, of the student for the tokens that it sampled.
        teacher_logp: of that shape, of the same tokens.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages: of the reward, [B] or one per token; None: 0.
        advantages_per: as for policy_loss.
        gamma: in [0, 1].
        normalize_length: whether there is a divisor.
        compat: "trl" for what TRL computes: without normalize_length gamma^i in place of gamma^(i - t); a masked cell
            is a step that counts 1e-4 in the divisor; and the result carries a gradient to logp where that requires
            one, which the method has not. TRL's trainer masks no cell, as its mask is of ids that are never ignored.

    Source: arXiv 2306.08543 (paper); TRL at commit f2cd577 (trainers).
    """
    check_number("gamma", gamma, 0, 1)
    if compat is not None:
        check_name("compat", compat, ("trl",))
        return _minillm_of_trl(
            logp, teacher_logp, mask, cu_seqlens, advantages, advantages_per, gamma, normalize_length
        )
    valid, r = _differences(logp, teacher_logp, mask, cu_seqlens)
    found = _discounted(valid, r, gamma, "skip")
    if normalize_length:
        found = found / _discounted(valid, torch.ones_like(r), gamma, "skip")
    return valid.put(found + _of_reward(valid, advantages, advantages_per), logp.dtype)


def _minillm_of_trl(
    logp: Tensor, teacher_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, advantages: Tensor | None,
    advantages_per: str | None, gamma: float, normalize_length: bool,
) -> Tensor:  # fmt: skip
    """In the dtype of logp, by autograd."""
    some = valid_of(logp.detach(), mask, cu_seqlens, "logp")
    every = valid_of(logp.detach(), None, cu_seqlens, "logp")
    _scored(some, teacher_logp)
    difference = _where_valid(some, "teacher_logp", teacher_logp, 0) - _where_valid(some, "logp", logp, 0)
    found = difference
    if gamma > 0:
        step = (every.cells - every.layout.cu_seqlens[every.row]).to(logp.dtype)
        power = torch.as_tensor(gamma, dtype=logp.dtype, device=logp.device) ** step
        found = every.suffix_sums(difference * power, 1.0)
        if normalize_length:
            found = found / every.suffix_sums(torch.where(some.layout.valid(), 1.0, 1e-4).to(logp.dtype) * power, 1.0)
    return found.view(logp.shape) + some.put(_of_reward(some, advantages, advantages_per), logp.dtype)


def _where_valid(valid: ValidTokens, name: str, x: Tensor, otherwise: float) -> Tensor:
    return torch.where(valid.layout.valid(), valid.layout.flat_tokens(name, x), otherwise)


def kept_probability(
    logp: Tensor,
    old_logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    fall: float = 0.2,
) -> Tensor:
    """1 where e^logp >= e^old_logp - fall, else 0: a token whose probability fell further pays nothing.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, a constant.
        old_logp: of that shape.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        fall: above 0, a difference of probabilities.

    Source: prime-rl's ref_kl at commit 559b447 (trainers).
    """
    check_number("fall", fall, above=0)
    valid = valid_of(logp, mask, cu_seqlens, "logp")
    fallen = valid.take("logp", logp).exp() - valid.take("old_logp", old_logp).exp() < -fall
    return valid.put((~fallen).double(), logp.dtype)


def _differences(
    logp: Tensor, teacher_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[ValidTokens, Tensor]:
    """teacher_logp - logp of the valid tokens, fp64 [M]."""
    valid = valid_of(logp, mask, cu_seqlens, "logp")
    return valid, _scored(valid, teacher_logp) - valid.take("logp", logp)


def _scored(valid: ValidTokens, teacher_logp: Tensor) -> Tensor:
    """fp64 [M]; on a GPU, where a look at it were a sync, a NaN shows in the result."""
    found = valid.take("teacher_logp", teacher_logp)
    if values_known(found) and (count := int(found.isnan().sum())):
        raise wrong("teacher_logp", f"NaN in {count} places", "a log-prob of every token in mask")
    return found


def _discounted(valid: ValidTokens, x: Tensor, gamma: float, holes: str) -> Tensor:
    check_number("gamma", gamma, 0, 1)
    check_name("holes", holes, HOLES)
    if gamma == 0:
        return x
    if holes == "skip":
        return valid.suffix_sums(x, gamma)
    every = valid_tokens(replace(valid.layout, mask=None))
    return every.suffix_sums(valid.put(x, torch.float64).view(-1), gamma)[valid.cells]


def _of_reward(valid: ValidTokens, advantages: Tensor | None, per: str | None) -> Tensor:
    """fp64 [M], 0 where there are none."""
    if advantages is None:
        if per is not None:
            raise wrong("advantages_per", repr(per), "None where there are no advantages")
        return torch.zeros_like(valid.cells, dtype=torch.float64)
    check_tensor("advantages", advantages)
    return valid.layout.of_tokens("advantages", advantages, torch.float64, per)[valid.cells]
