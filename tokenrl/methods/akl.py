"""AKL: forward and reverse KL, weighed token by token by where student and teacher differ.

    share = head_share(logits, other_logits, row_mask=mask)                # or linear_head_share
    head, _ = distillation_loss("forward_kd", logits, other_logits, mask=mask, token_weight=share)
    tail, _ = distillation_loss("reverse_kd", logits, other_logits, mask=mask, token_weight=1 - share)
    loss = head + tail                                                     # or linear_distillation_loss

    share = sum_{head} |p - r| / sum |p - r|

The head: the teacher's most likely ids whose probabilities together stay within `mass`, and always the first. Without
gradient, as in the authors' code.

Source: AKL, arXiv 2404.02657, as in AdaKD's code (trainers).
"""

import torch
from torch import Tensor

from ..batch.checks import check_number, check_tensor
from ..errors import wrong
from ..logprobs.divergence import head_pair
from ..logprobs.row_chunks import row_chunks, rows_of
from ..ops.linear.gemm import linear

BYTES = 48  # of a logit of either model, while its row is sorted


@torch.no_grad()
def head_share(
    logits: Tensor,
    other_logits: Tensor,
    *,
    mass: float = 0.5,
    row_mask: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """[..], fp32 or fp64: in [0, 1], 0 in rows that row_mask leaves out and where p = r.

    Args:
        logits: the student's, floats [N, V] or [B, T, V].
        other_logits: the teacher's, of that shape; of equal probabilities the lower id is first.
        mass: in [0, 1], what the teacher's probabilities in the head sum up to at most.
        row_mask: bool [N] or [B, T].
        memory_budget: bytes held beyond inputs and result, as for topk_ids.
    """
    for name, x in (("logits", logits), ("other_logits", other_logits)):
        check_tensor(name, x)
    if other_logits.shape != logits.shape:
        raise wrong("other_logits", f"shape {list(other_logits.shape)}", f"that of logits, {list(logits.shape)}")
    check_number("mass", mass, 0, 1)
    out = logits.new_zeros(logits.shape[:-1], dtype=torch.promote_types(logits.dtype, torch.float32))
    for at in row_chunks(logits, row_mask, memory_budget, BYTES):
        out.view(-1)[at] = _share(rows_of(logits, at).to(out.dtype), rows_of(other_logits, at).to(out.dtype), mass)
    return out


@torch.no_grad()
def linear_head_share(
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    *,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    mass: float = 0.5,
    row_mask: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """head_share of the logits hidden @ weight^T + bias and those of the other head, of which only chunks of rows are
    held.

    Args:
        hidden: the student's, [N, D] or [B, T, D]; no gradient passes.
        weight: [V, D].
        other_hidden: the teacher's, [N, D'] or [B, T, D'].
        other_weight: [V, D'].
        bias: [V].
        other_bias: [V], without a gradient.
        mass: as for head_share.
        row_mask: bool [N] or [B, T].
        memory_budget: bytes of the chunks, as for topk_ids.
    """
    check_number("mass", mass, 0, 1)
    for name, x in (("other_hidden", other_hidden), ("other_weight", other_weight)):
        check_tensor(name, x)
    own, other = head_pair(
        (hidden, weight, bias, 1.0, None, 1.0, None),
        (other_hidden.detach(), other_weight.detach(), other_bias, 1.0, None, 1.0, None), row_mask, None, memory_budget,
    )  # fmt: skip
    like = hidden.new_empty(()).expand(*hidden.shape[:-1], len(weight))
    out = hidden.new_zeros(hidden.shape[:-1], dtype=torch.promote_types(hidden.dtype, torch.float32))
    for at in row_chunks(like, row_mask, own.memory_budget, BYTES):
        p, r = (linear(x.hidden[at], x.weight, x.bias).to(out.dtype) for x in (own, other))
        out.view(-1)[at] = _share(p, r, mass)
    return out


def _share(logits: Tensor, other: Tensor, mass: float) -> Tensor:
    p, r = logits.softmax(-1), other.softmax(-1)
    order = r.argsort(dim=-1, descending=True, stable=True)
    apart = (p - r).abs().gather(-1, order)
    head = r.gather(-1, order).cumsum(-1) <= mass
    head[:, 0] = True
    total = apart.sum(-1)
    return torch.where(total > 0, torch.where(head, apart, 0).sum(-1) / total.where(total > 0, 1), 0)
