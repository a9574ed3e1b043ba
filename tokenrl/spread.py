"""A statistic of per-token values as a differentiable op of its own, on every backend."""

import torch
from torch import Tensor

from . import reference
from .backends import Backend
from .layout import Layout


class _Statistic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, old_logp, mask, cu_seqlens, starts, statistic, flow, ops):
        ctx.save_for_backward(mask, cu_seqlens, starts)
        ctx.rest = statistic, flow, ops
        return ops.statistic(logp, old_logp, mask, cu_seqlens, starts, statistic)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        statistic, flow, ops = ctx.rest
        grad_logp = ops.statistic_backward(grad.contiguous(), *ctx.saved_tensors, statistic, flow)
        return grad_logp, None, None, None, None, None, None, None


def spread(
    chosen: Backend, layout: Layout, logp: Tensor, old_logp: Tensor, starts: Tensor | None, statistic: str, flow: str
) -> Tensor:
    """The statistic of logp - old_logp over each token's span, flat [N], zero in masked cells."""
    if chosen.namespace is None:
        return reference.spread(
            logp, old_logp, layout.valid(), layout.cu_seqlens, starts, statistic, flow, layout.width
        )
    return _Statistic.apply(logp, old_logp, layout.mask, layout.cu_seqlens, starts, statistic, flow, chosen.ops)
