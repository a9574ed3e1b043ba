"""A loss of K ids' log-probs from hidden states, with its gradients, in one pass over chunks of tokens.

What a chunk's log-probs do to the loss is known as soon as they are: 6 N D V flops, where linear_token_logprobs
needs 8 unless all logits fit, and no logits are held beyond a chunk. The terms of the loss are torch, with autograd's
derivative.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..derivatives import is_last_use, once
from ..kernel_ops import IGNORED
from .gemm import ProductSum, scaled, sum_bytes, sum_dtype
from .head import HeadInputs, Rows, compacted, rows_at, split, whole_rows_of
from .lift import lifted
from .main_grad import MainGrad
from .ranks import chunks_of
from .token_logprobs import Gradients

WEIGHT = 1  # its place among the tensors
# Of some rows, their log-probs [n, K] and entropies [n]: the tokens' values [n], the loss's gradients by both, or None.
Terms = Callable[[Rows, Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor | None]]


def run(ops: Any, inputs: HeadInputs, terms: Terms, grads: Gradients) -> Tensor:
    """The values [N], 0 of rows whose ids are all ignored, which enter no GEMM; fills grads."""
    head, ids = inputs.head(ops), inputs.ids
    index, count = compacted((ids != IGNORED).any(-1))
    values = inputs.hidden.new_zeros(len(ids), dtype=sum_dtype(head.dtype))
    rows = whole_rows_of(head, count, inputs.memory_budget, sum_bytes(grads.weight, head.dtype)).rows
    weight_sum = None
    if grads.weight is not None:
        weight_sum = ProductSum(grads.weight, head.dtype, once=rows >= count, adds=grads.adds)
    for own in chunks_of(head, inputs.hidden, ids, [rows_at(index, at) for at in split(count, rows)]):
        values[own.rows], by_logp, by_entropy = terms(own.rows, own.logp, own.entropy)
        if grads != Gradients(None, None, None):
            upstream, by = lifted(head, own.rows, (by_logp, by_entropy, None, None), own.states)
            own.differentiate(upstream)
            own.accumulate(by, weight_sum, grads)
    if weight_sum is not None:
        weight_sum.finish()
    return values


def _times_upstream(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a checkpoint gives them out a single time
    half = len(saved) // 2
    grads, tensors = saved[:half], saved[half:]
    made, last = zip(grads, tensors, strict=True), is_last_use(ctx)

    def times(g: Tensor | None, x: Tensor) -> Tensor | None:
        if g is None:
            return None
        if ctx.main_grad is not None and g is grads[WEIGHT]:
            return ctx.main_grad.add(g, grad)
        return scaled(g, grad, x.dtype, last)

    return None, None, *(times(g, x) for g, x in made), *(None for _ in grads)


@functools.cache
def with_gradients(name: str) -> type[torch.autograd.Function]:
    """apply(loss, main_grad, *tensors, *their gradients): the loss of the function of that name, whose gradients are
    there, None where not wanted. Of the tensors hidden and weight come first."""

    class WithGradients(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: Tensor, main_grad: Tensor | None, *both: Tensor | None) -> Tensor:
            half, ctx.alone = len(both) // 2, True
            weight = both[WEIGHT]
            ctx.main_grad = None if weight is None else MainGrad.of(main_grad, weight)
            grads = both[half:]
            made = (x if g is not None else None for x, g in zip(both[:half], grads, strict=True))
            ctx.save_for_backward(*grads, *made)  # of the others some may be of inference mode
            return loss.clone()

        backward = staticmethod(once(_times_upstream, name))

    return WithGradients
