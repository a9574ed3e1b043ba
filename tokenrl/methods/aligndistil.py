"""AlignDistil: RLHF as distillation from a teacher made of two models' logits, z* = a z_D + b z_R. Without gradient.

    teacher, coef = teacher_of("aligndistil", dpo_logits, other_logits, mask=mask)
    loss, _ = distillation_loss("reverse_kd", logits, teacher, mask=mask, token_weight=coef,
                                aggregation="seq-mean-token-mean")

z_D are the logits of a model trained with DPO, z_R those of its reference or, in the contrastive variants, of a model
trained with DPO on swapped pairs. With w_t = beta2 sum_v |p_D - p_R| + 0.001, per token:

    "theorem1"           z* = w z_D + (1 - w) z_R, w = beta / beta2          coef = beta2
    "theorem1_contrast"  z* = w (z_D - z_R) + z_D, w = beta / beta2          coef = beta2
    "theorem1_adaptive"  z* = w_t z_D + (1 - w_t) z_R                        coef = beta / w_t
    "aligndistil"        z* = w_t (z_D - z_R) + z_D                          coef = beta / w_t

From hidden states the combination of two heads is a head, that of their hidden states side by side, so that no logits
are held and the teacher costs what both heads cost:

    hidden, weight, coef = linear_teacher_of("aligndistil", dpo_hidden, dpo_weight, other_hidden, other_weight)
    loss, _ = linear_distillation_loss("reverse_kd", student_hidden, student_weight, hidden, weight, token_weight=coef)

The fifth, "gkd" of their on-policy trainer, is distillation_loss("reverse_kd", logits, dpo_logits). A kd_temperature is
other_temperature off-policy, and temperature too on-policy.

Source: arXiv 2503.02832 (authors' code).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..batch.checks import check_name, check_number
from ..logprobs.divergence import linear_token_divergence, token_divergence

VARIANTS = ("theorem1", "theorem1_contrast", "theorem1_adaptive", "aligndistil")
CONTRASTIVE, ADAPTIVE = ("theorem1_contrast", "aligndistil"), ("theorem1_adaptive", "aligndistil")
LEAST = 1e-3


def teacher_of(
    variant: str, dpo_logits: Tensor, other_logits: Tensor, *, beta: float = 0.1, beta2: float = 10.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(z*, of the logits' shape and dtype; coef, fp32 or fp64 [B, T]).

    dpo_logits, other_logits: [B, T, V] or [N, V] of one dtype. beta: of the DPO models; beta2: 10 off-policy and 15
    on-policy in the authors' scripts, a plain number near 1 in the variants that are not adaptive. mask: bool of the
    tokens that are looked at.
    """
    dpo_logits, other_logits = dpo_logits.detach(), other_logits.detach()

    def apart() -> Tensor:
        found = token_divergence(dpo_logits, other_logits, "total_variation", row_mask=mask)
        assert isinstance(found, Tensor)
        return found

    weight, coef = _weights(variant, beta, beta2, dpo_logits, apart)
    share = weight[..., None]
    moved = share * (dpo_logits.to(share.dtype) - other_logits)
    return ((dpo_logits if variant in CONTRASTIVE else other_logits) + moved).to(dpo_logits.dtype), coef


def linear_teacher_of(
    variant: str, dpo_hidden: Tensor, dpo_weight: Tensor, other_hidden: Tensor, other_weight: Tensor, *,
    beta: float = 0.1, beta2: float = 10.0, mask: Tensor | None = None, compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(hidden [B, T, D + D'], weight [V, D + D'], coef [B, T]) of the head whose logits are z*.

    dpo_hidden [B, T, D] or [N, D], dpo_weight [V, D]; other_hidden [B, T, D'] or [N, D'], other_weight [V, D']. The
    weight is a copy of both: where they stay the same, made once by torch.cat outside serves every batch.
    compute_dtype, memory_budget: as for linear_token_divergence. The rest as for teacher_of.
    """
    dpo_hidden, other_hidden = dpo_hidden.detach(), other_hidden.detach()
    dpo_weight, other_weight = dpo_weight.detach(), other_weight.detach()

    def apart() -> Tensor:
        return linear_token_divergence(
            dpo_hidden, dpo_weight, other_hidden, other_weight, "total_variation", row_mask=mask,
            compute_dtype=compute_dtype, memory_budget=memory_budget,
        )  # fmt: skip

    weight, coef = _weights(variant, beta, beta2, dpo_hidden, apart)
    share, dtype = weight[..., None], dpo_hidden.dtype
    of_dpo, of_other = (1 + share, -share) if variant in CONTRASTIVE else (share, 1 - share)
    hidden = torch.cat(((of_dpo * dpo_hidden).to(dtype), (of_other * other_hidden).to(dtype)), -1)
    return hidden, torch.cat((dpo_weight, other_weight), -1), coef


def _weights(
    variant: str, beta: float, beta2: float, like: Tensor, apart: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """(w, coef) of the tokens, where apart() is the total variation of both models."""
    check_name("variant", variant, VARIANTS)
    check_number("beta", beta, above=0)
    check_number("beta2", beta2, above=0)
    if variant in ADAPTIVE:
        weight = 2 * beta2 * apart() + LEAST
        return weight, beta / weight
    weight = like.new_full(like.shape[:-1], beta / beta2, dtype=_wide(like))
    return weight, torch.full_like(weight, beta2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
