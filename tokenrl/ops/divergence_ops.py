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
class _Rows(OpArguments):
    """rows: bool, false takes a row out."""

    rows: Tensor | None


@dataclass(frozen=True)
class DivergenceInputs(OtherTransform, Transform, _Rows):
    """Beside the logits. kind, params: of the divergence, its parameters in order."""

    kind: str
    params: list[float]


# statistics, [4] of rows: lse and lse_rest of the logits and of the other ones, as token_logprobs gives them. They are
# given where another kind of the same logits has found them.
SCHEMAS = {
    "divergence": schema(
        "Tensor logits, Tensor other_logits, Tensor? statistics", DivergenceInputs,
        returns="(Tensor value, Tensor by_p, Tensor by_r, Tensor statistics)",
    ),
    "divergence_backward": schema(
        "Tensor grad, Tensor logits, Tensor other_logits, Tensor by, str of, Tensor statistics", DivergenceInputs,
        returns="Tensor",
    ),
}  # fmt: skip


def divergence_results(logits: Tensor) -> tuple[Tensor, ...]:
    """(value, by_p, by_r, statistics), uninitialised."""
    rows, dtype = logits.shape[:-1], torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty((*lead, *rows), dtype=dtype) for lead in ((), (), (), (4,)))


FAKES: dict[str, Callable[..., Any]] = {
    "divergence": lambda logits, *rest: divergence_results(logits),
    "divergence_backward": lambda grad, logits, *rest: logits.new_empty(logits.shape),
}


def save_divergence(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, other, _, *rest = inputs
    given = DivergenceInputs(*rest)
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.tensors = [name for name, x in vars(given).items() if isinstance(x, Tensor)]
    ctx.given = {name: x for name, x in vars(given).items() if name not in ctx.tensors}
    ctx.save_for_backward(logits, other, *kept, *(getattr(given, name) for name in ctx.tensors))
    ctx.set_materialize_grads(False)


def divergence_backward(namespace: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None
        logits, other, by_p, by_r, statistics, *saved = ctx.saved_tensors
        given = DivergenceInputs(**ctx.given, **dict(zip(ctx.tensors, saved, strict=True)))
        op = ranges.kernels(namespace).divergence_backward
        sides = (("logits", by_p), ("other_logits", by_r))
        return tuple(
            op(grad.contiguous(), logits, other, by, of, statistics, *given) if wanted else None
            for (of, by), wanted in zip(sides, ctx.needs_input_grad, strict=False)
        )

    return backward


def register(namespace: str) -> None:
    """Gives the ops of a namespace their fakes and derivatives."""
    for op, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{op}", fake)
    register_derivative(namespace, "divergence", save_divergence, divergence_backward(namespace), 2)
