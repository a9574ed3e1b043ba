"""Op linear_divergence, written once over the kernels of every backend: schema, fake, derivative and implementation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ranges
from .arguments import schema
from .derivatives import is_last_use, register_derivative
from .linear import divergence, token_logprobs
from .linear.divergence import LinearDivergenceInputs
from .linear.gemm import scaled, sum_dtype, weighed_sum
from .linear.ranks import ONE, OneRank
from .linear_ops import (
    GRADS,
    HOST_READS,
    dtypes_of,
    eager_numbers,
    fake_results,
    gradients_of,
    results_of,
    waiting_dtypes,
)

OP = "linear_divergence"
SCHEMAS = {OP: schema(LinearDivergenceInputs, returns=f"(Tensor loss, Tensor value, {GRADS})")}


def _run(ops: Any, *args: Any) -> tuple[Tensor, ...]:
    inputs = LinearDivergenceInputs(*args)
    dtypes = waiting_dtypes(inputs)
    grads = gradients_of(inputs, now(inputs), dtypes)
    return *evaluated(ops, inputs, grads, ONE), *results_of(grads, inputs.hidden, dtypes)


def now(inputs: LinearDivergenceInputs) -> list[bool]:
    """The gradients that are made at once."""
    return [inputs.weights is not None and want for want in inputs.wanted]


def evaluated(
    ops: Any, inputs: LinearDivergenceInputs, grads: token_logprobs.Gradients, ranks: OneRank
) -> tuple[Tensor, Tensor]:
    """(the loss, the divergences); fills grads."""
    value = divergence.run(ops, inputs, grads, ranks)
    return value.new_zeros(()) if inputs.weights is None else weighed_sum(inputs.weights, value), value


def fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, _ = LinearDivergenceInputs.read(args)
    loss = inputs.hidden.new_empty((), dtype=sum_dtype(inputs.dtype))
    value = loss.new_empty(inputs.ids.shape[0])
    return loss, value, *fake_results(inputs, now(inputs), waiting_dtypes(inputs))


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Of the loss its gradients, which it has made; of the divergences what makes them again. inputs: others may follow
    those of the op."""
    loss, value, *grads = output
    given, ctx.more = LinearDivergenceInputs.read(inputs)
    ctx.wanted, ctx.given = given.wanted, None
    if given.weights is not None:
        ctx.mark_non_differentiable(value, *grads)
        ctx.save_for_backward(*grads, given.hidden, given.weight, given.bias)
    else:
        ctx.mark_non_differentiable(loss, *grads)
        ctx.tensors = [name for name, x in vars(given).items() if isinstance(x, Tensor)]
        ctx.given = {name: x for name, x in vars(given).items() if name not in ctx.tensors}
        ctx.save_for_backward(*(getattr(given, name) for name in ctx.tensors))
    ctx.set_materialize_grads(False)


def backward_of(namespace: str, name: str = OP) -> Callable[..., Any]:
    """Of the op of that name."""

    def backward(ctx: Any, grad_loss: Tensor | None, grad_value: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.given is None:
            if grad_loss is None:
                return None, None, None
            *grads, hidden, weight, bias = ctx.saved_tensors
            with ranges.around_backward(namespace, name, hidden, weight):
                found, last = zip(grads, (hidden, weight, bias), ctx.wanted, strict=True), is_last_use(ctx)
                return tuple(scaled(g, grad_loss, x.dtype, last) if want else None for g, x, want in found)
        if grad_value is None:
            return None, None, None
        given = ctx.given | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
        given |= {"weights": grad_value.contiguous()}
        op, inputs = getattr(ranges.kernels(namespace), name), LinearDivergenceInputs(**given)
        with ranges.around_backward(namespace, name, inputs.hidden, inputs.weight):
            _, _, *grads = op(*inputs, *ctx.more)
        found = zip(grads, dtypes_of(inputs), ctx.wanted, strict=True)
        return tuple(g.to(dtype) if want else None for g, dtype, want in found)

    return backward


_LIBRARIES: dict[str, torch.library.Library] = {}


def register(namespace: str) -> None:
    """Gives a namespace of kernels this op."""
    library = _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
    library.define(OP + SCHEMAS[OP], tags=HOST_READS)
    for key in ("CPU", "CUDA"):
        library.impl(OP, eager_numbers(_run, namespace), key)
    torch.library.register_fake(f"{namespace}::{OP}", fake)
    register_derivative(namespace, OP, save, backward_of(namespace), 3)
