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

From hidden states linear_teacher_of gives a head in the place of z*. The fifth, "gkd" of their on-policy trainer, is
distillation_loss("reverse_kd", logits, dpo_logits). A kd_temperature is other_temperature off-policy, and temperature
too on-policy.

Source: arXiv 2503.02832 (authors' code).
"""

import torch
from torch import Tensor

from ..batch.checks import check_name, check_number, check_tensor
from ..errors import wrong
from ..logprobs.combined_head import combined_head
from ..logprobs.combined_logits import combined_rows
from ..logprobs.divergence import linear_token_divergence, token_divergence

VARIANTS = ("theorem1", "theorem1_contrast", "theorem1_adaptive", "aligndistil")
CONTRASTIVE, ADAPTIVE = ("theorem1_contrast", "aligndistil"), ("theorem1_adaptive", "aligndistil")
LEAST = 1e-3


def teacher_of(
    variant: str, dpo_logits: Tensor, other_logits: Tensor, *, beta: float = 0.1, beta2: float = 10.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(z*, of the logits' shape and dtype, 0 in rows left out; coef, fp32 or fp64 [B, T]).

    Args:
        variant: one of the four above.
        dpo_logits: z_D, floats [B, T, V] or [N, V]; no gradient passes.
        other_logits: z_R, of the same shape and dtype.
        beta: of the DPO models, above 0.
        beta2: 10 off-policy and 15 on-policy in the authors' scripts, a plain number near 1 in the variants that are
            not adaptive.
        mask: bool of the tokens that are looked at.
    """
    _check(variant, mask, dpo_logits=dpo_logits, other_logits=other_logits)
    dpo_logits, other_logits = dpo_logits.detach(), other_logits.detach()
    adaptive = variant in ADAPTIVE
    apart = token_divergence(dpo_logits, other_logits, "total_variation", row_mask=mask) if adaptive else None
    assert apart is None or isinstance(apart, Tensor)
    weight, coef = _weight(variant, beta, beta2, apart, dpo_logits)
    teacher = torch.zeros_like(dpo_logits, memory_format=torch.contiguous_format)
    for at, z in combined_rows(dpo_logits, other_logits, *_shares(variant, weight), mask):
        teacher.view(-1, teacher.shape[-1])[at] = z.to(teacher.dtype)
    return teacher, coef


@torch.no_grad()
def linear_teacher_of(
    variant: str, dpo_hidden: Tensor, dpo_weight: Tensor, other_hidden: Tensor, other_weight: Tensor, *,
    beta: float = 0.1, beta2: float = 10.0, mask: Tensor | None = None, memory_budget: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(hidden, weight, coef) of z* for linear_distillation_loss, by tokenrl.combined_head: no logits are held.

    Args:
        variant: as for teacher_of.
        dpo_hidden: [B, T, D] or [N, D] of the model whose logits are z_D.
        dpo_weight: [V, D].
        other_hidden: likewise of z_R.
        other_weight: [V, D'].
        beta: as for teacher_of.
        beta2: as for teacher_of.
        mask: bool of the tokens that are looked at.
        memory_budget: bytes of the chunks, as for linear_token_logprobs.
    """
    given = {"dpo_hidden": dpo_hidden, "dpo_weight": dpo_weight, "other_hidden": other_hidden}
    _check(variant, mask, **given, other_weight=other_weight)
    apart = None
    if variant in ADAPTIVE:
        heads = (dpo_hidden.detach(), dpo_weight.detach(), other_hidden.detach(), other_weight.detach())
        apart = linear_token_divergence(*heads, "total_variation", row_mask=mask, memory_budget=memory_budget)
    weight, coef = _weight(variant, beta, beta2, apart, dpo_hidden)
    heads = dpo_hidden, dpo_weight, other_hidden, other_weight
    return *combined_head(*heads, *_shares(variant, weight)), coef


def _check(variant: str, mask: Tensor | None, **given: Tensor) -> None:
    check_name("variant", variant, VARIANTS)
    for name, x in given.items():
        check_tensor(name, x)
    rows = next(iter(given.values())).shape[:-1]
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dtype != torch.bool or mask.shape != rows:
            raise wrong("mask", f"{mask.dtype} {list(mask.shape)}", f"bool {list(rows)}")


def _shares(variant: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of z* = a z_D + b z_R."""
    return (1 + weight, -weight) if variant in CONTRASTIVE else (weight, 1 - weight)


def _weight(
    variant: str, beta: float, beta2: float, apart: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(w, coef), [..] each. apart: the total variation of both models, None where w is a number."""
    check_number("beta", beta, above=0)
    check_number("beta2", beta2, above=0)
    if apart is not None:
        weight = 2 * beta2 * apart + LEAST
        return weight, beta / weight
    weight = like.new_full(like.shape[:-1], beta / beta2, dtype=torch.promote_types(like.dtype, torch.float32))
    return weight, torch.full_like(weight, beta2)
