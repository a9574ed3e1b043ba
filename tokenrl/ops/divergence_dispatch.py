"""One function per op of two heads, as in dispatch.py: the reference, or a backend's kernels, with their derivative."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..objectives.divergences import Divergence
from . import reference
from .backends import Backend
from .derivatives import call
from .kernel_ops import IGNORED, Transform
from .linear.gemm import weighed_sum
from .linear.head import HeadInputs


def divergences(
    chosen: Backend, logits: Tensor, other_logits: Tensor, rows: Tensor | None, transform: Transform, other: Transform,
    kinds: Sequence[Divergence],
) -> list[Tensor]:  # fmt: skip
    """Of p, of the logits, from r, of the other ones, for each row that `rows` leaves in, else 0."""
    if chosen.is_reference:
        return [reference.divergence(logits, other_logits, rows, transform, other, kind) for kind in kinds]
    values, statistics = [], None
    for kind in kinds:
        given = (rows, *transform, *other, kind.name, kind.params())  # DivergenceInputs
        value, _, _, statistics = call(chosen.namespace, "divergence", logits, other_logits, statistics, *given)
        values.append(value)
    return values


def linear_divergence(
    chosen: Backend, head: HeadInputs, other: HeadInputs, kind: Divergence, weights: Tensor | None
) -> tuple[Tensor, ...]:
    """(sum_t w_t D_t, the divergences [N]) from hidden states; the loss is differentiable where there are weights, else
    the divergences are."""
    transform = (other.temperature, other.temperatures, other.softcap, other.logit_scale, other.keep_mask)
    if chosen.is_reference:
        used = (head.ids != IGNORED).squeeze(1)
        own = (head.temperature, head.temperatures, head.softcap, head.logit_scale, head.keep_mask)
        logits, other_logits = reference.head_logits(head), reference.head_logits(other)
        value = reference.divergence(logits, other_logits, used, Transform(*own), Transform(*transform), kind)
        loss = value.new_zeros(()) if weights is None else weighed_sum(weights, value)
        return loss, value if weights is None else value.detach()
    tensors = (head.hidden, head.weight, head.bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    inputs = (*head, other.hidden, other.weight, other.bias, *transform, kind.name, kind.params(), weights, wanted)
    return call(chosen.namespace, "linear_divergence", *inputs)[:2]
