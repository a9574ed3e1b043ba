"""What the model itself, once it has seen the answer or a skill, says of tokens that it sampled without: RLSD, SDAR.

    A = rlsd_advantages(logp, teacher_logp, A, mask=mask)                  # which tokens the reward goes to
    loss, _ = tokenrl.policy_loss("grpo", new_logp, logp, A, mask=mask)

    gate = sdar_gate(new_logp.detach(), teacher_logp, mask=mask)           # and beside the loss of the reward
    extra, _ = tokenrl.policy_loss("kl_k1", new_logp, teacher_logp, None, mask=mask, token_weight=-gate)
    loss = loss + 0.1 * extra                                              # = mean_t gate_t (teacher_logp - logp)

teacher_logp: of the same tokens, of the policy whose prompt has the answer. SDPO and SDFT (TRL), which distill from it
too, are of tokenrl.on_policy_distillation where they see sampled tokens, topk_distillation_loss or distillation_loss
with "gkd" where they see more. Log-probs are fp32 or fp64, padded [B, T] with a bool mask, or packed [N] with
cu_seqlens [S + 1]; results have their shape and dtype, are without gradient and 0 in masked cells, which may hold
anything.

Source: RLSD and SDAR, authors' code as ms-swift 4.6 has it (trainers).
"""

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_number
from ..batch.valid_tokens import valid_of


def rlsd_advantages(
    logp: Tensor,
    teacher_logp: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages_per: str | None = None,
    share: float = 0.5,
    eps: float = 0.2,
    negative_only: bool = False,
) -> Tensor:
    """A (1 - share + share clip(e^(sign(A) (teacher_logp - logp)), 1 - eps, 1 + eps)): the sign stays, tokens that the
    informed self likes better carry more of a good reward and less of a bad one.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, of the policy that sampled, a constant.
        teacher_logp: of that shape, of the same tokens.
        advantages: [B] (or [S]), or one per token; a constant.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages_per: as for policy_loss.
        share: in [0, 1]; the authors let it rise to 0.5 and fall again.
        eps: at least 0, of the clip.
        negative_only: A >= 0 stays as it is.
    """
    check_number("share", share, 0, 1)
    check_number("eps", eps, 0)
    valid = valid_of(logp, mask, cu_seqlens, "logp")
    check_constant("advantages", advantages)
    a = valid.layout.of_tokens("advantages", advantages, torch.float64, advantages_per)[valid.cells]
    difference = valid.take("teacher_logp", teacher_logp) - valid.take("logp", logp)
    weight = 1 - share + share * (a.sign() * difference).exp().clamp(1 - eps, 1 + eps)
    if negative_only:
        weight = torch.where(a < 0, weight, 1.0)
    return valid.put(a * weight, logp.dtype)


def sdar_gate(
    logp: Tensor,
    teacher_logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 5.0,
) -> Tensor:
    """sigmoid(beta (teacher_logp - logp)) of the current log-probs, detached: to 1 where the informed self is surer.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, current, detached.
        teacher_logp: of that shape, of the same tokens.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        beta: a number, per nat.
    """
    check_number("beta", beta)
    valid = valid_of(logp, mask, cu_seqlens, "logp")
    difference = valid.take("teacher_logp", teacher_logp) - valid.take("logp", logp)
    return valid.put((beta * difference).sigmoid(), logp.dtype)
