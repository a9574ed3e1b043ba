"""The ops of two heads' logits that every kernel backend implements: their arguments, fakes and derivatives.

Those of one head: tokenrl/ops/kernel_ops.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ranges
from .arguments import OpArguments, schema
from .derivatives import register_derivative
from .kernel_ops import Transform


@dataclass(frozen=True)
class OtherTransform(OpArguments):
    """That of the other head's logits."""

    other_temperature: float
    other_temperatures: Tensor | None
    other_softcap: float
    other_logit_scale: float
    other_keep_mask: Tensor | None


@dataclass(frozen=True)
class PairStatistics(OpArguments):
    """Of the rows of two heads' logits, as token_logprobs gives them. rows: bool, false takes a row out."""

    lse: Tensor
    lse_rest: Tensor
    other_lse: Tensor
    other_lse_rest: Tensor
    rows: Tensor | None


@dataclass(frozen=True)
class DivergenceInputs(OtherTransform, Transform, PairStatistics):
    """Beside the logits. of: the kind, its parameters in order."""

    kind: str
    params: list[float]


SCHEMAS = {
    "divergence": schema(
        "Tensor logits, Tensor other_logits", DivergenceInputs, returns="(Tensor value, Tensor by_p, Tensor by_r)"
    ),
    "divergence_backward": schema(
        "Tensor grad, Tensor logits, Tensor other_logits, Tensor by, str of", DivergenceInputs, returns="Tensor"
    ),
}
FAKES: dict[str, Callable[..., Any]] = {
    "divergence": lambda logits, other, lse, *rest: tuple(torch.empty_like(lse) for _ in range(3)),
    "divergence_backward": lambda grad, logits, *rest: logits.new_empty(logits.shape),
}


def _save_divergence(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, other, *rest = inputs
    given = DivergenceInputs(*rest)
    value, *by = output
    ctx.mark_non_differentiable(*by)
    ctx.tensors = [name for name, x in vars(given).items() if isinstance(x, Tensor)]
    ctx.given = {name: x for name, x in vars(given).items() if name not in ctx.tensors}
    ctx.save_for_backward(logits, other, *by, *(getattr(given, name) for name in ctx.tensors))
    ctx.set_materialize_grads(False)


def _divergence_backward(namespace: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None
        logits, other, by_p, by_r, *saved = ctx.saved_tensors
        given = DivergenceInputs(**ctx.given, **dict(zip(ctx.tensors, saved, strict=True)))
        op = ranges.kernels(namespace).divergence_backward
        sides = (("logits", by_p), ("other_logits", by_r))
        return tuple(
            op(grad.contiguous(), logits, other, by, of, *given) if wanted else None
            for (of, by), wanted in zip(sides, ctx.needs_input_grad, strict=False)
        )

    return backward


def register(namespace: str) -> None:
    """Gives the ops of a namespace their fakes and derivatives."""
    for op, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{op}", fake)
    register_derivative(namespace, "divergence", _save_divergence, _divergence_backward(namespace), 2)
