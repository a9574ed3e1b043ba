"""One function per op of two heads, as in dispatch.py: the reference, or a backend's kernels, with their derivative."""

from collections.abc import Sequence

from torch import Tensor

from ..objectives.divergences import Divergence
from . import reference
from .backends import Backend
from .derivatives import call
from .dispatch import wanted
from .kernel_ops import IGNORED, Transform
from .linear.divergence import LinearDivergenceInputs
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
    if chosen.is_reference:
        used = (head.ids != IGNORED).squeeze(1)
        logits, other_logits = reference.head_logits(head), reference.head_logits(other)
        value = reference.divergence(logits, other_logits, used, transform_of(head), transform_of(other), kind)
        loss = value.new_zeros(()) if weights is None else weighed_sum(weights, value)
        return loss, value if weights is None else value.detach()
    return call(chosen.namespace, "linear_divergence", *linear_inputs(head, other, kind, weights))[:2]


def linear_inputs(
    head: HeadInputs, other: HeadInputs, kind: Divergence, weights: Tensor | None
) -> LinearDivergenceInputs:
    return LinearDivergenceInputs(  # type: ignore[call-arg]  # more after a *
        *head, other.hidden, other.weight, other.bias, *transform_of(other), kind.name, kind.params(), weights,
        wanted(head),
    )  # fmt: skip


def transform_of(head: HeadInputs) -> Transform:
    return Transform(head.temperature, head.temperatures, head.softcap, head.logit_scale, head.keep_mask)
