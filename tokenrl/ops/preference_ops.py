"""The ops of preference losses that every kernel backend implements: their arguments, fakes and derivatives.

A loss is a link of the scores of two sequences, or of one labelled one, and a score is a sum over tokens: what leads
back from the loss to a token is its share of that sum times one number per sequence, the slope, which the forward
knows. The formulas: tokenrl/ops/preference_reference.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ranges
from .arguments import OpArguments, schema
from .derivatives import register_derivative


@dataclass(frozen=True)
class Trained(OpArguments):
    """[N] of what gets a gradient."""

    logp: Tensor
    divergence: Tensor | None
    token_weight: Tensor | None
    divergence_weight: Tensor | None


@dataclass(frozen=True)
class WhereTokensLie(OpArguments):
    ref_logp: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor


@dataclass(frozen=True)
class PreferenceOpInputs(WhereTokensLie, Trained):
    """Of op preference: what PreferenceInputs holds, and its row. link, score: their names, with their parameters in
    order."""

    pairs: Tensor | None
    desirable: Tensor | None
    base: Tensor | None
    pair_weight: Tensor | None
    normalizer: Tensor | None
    nll_mask: Tensor | None
    nll_normalizer: Tensor | None
    link: str
    link_params: list[float]
    score: str
    score_params: list[float]
    statistic: str
    coupling: str
    divergence_factor: float
    divergence_flow: str
    length: float
    nll: float


GRADIENTS = "(Tensor of_logp, Tensor of_divergence, Tensor of_token_weight, Tensor of_divergence_weight)"
# slopes: fp64 [3, S], of the loss in each sequence's sum of log ratios, in that of its divergences, and in the log-prob
# of one of its tokens in the nll term. rewards: fp64 [3, M]. The backward gives (0,) for what is not wanted.
SCHEMAS = {
    "preference": schema(
        PreferenceOpInputs, returns="(Tensor loss, Tensor slopes, Tensor rewards, Tensor accuracy)"
    ),
    "preference_backward": schema(
        "Tensor grad, Tensor slopes", Trained, WhereTokensLie, "Tensor? nll_mask, bool nll, bool[] wanted",
        returns=GRADIENTS,
    ),
}  # fmt: skip


def results(given: PreferenceOpInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the results of op preference."""
    sequences = given.cu_seqlens.shape[0] - 1
    losses = sequences if given.desirable is not None else sequences // 2
    losses = losses if given.pairs is None else given.pairs.shape[0]
    wide = [given.logp.new_empty(shape, dtype=torch.float64) for shape in ((3, sequences), (3, losses), ())]
    return given.logp.new_empty(()), *wide  # type: ignore[return-value]


def gradients(logp: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Memory for the results of its backward."""
    return tuple(logp.new_empty(logp.shape if w else (0,)) for w in wanted)


FAKES: dict[str, Callable[..., Any]] = {
    "preference": lambda *args: results(PreferenceOpInputs(*args)),
    "preference_backward": lambda grad, slopes, logp, *rest: gradients(logp, rest[-1]),
}


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = PreferenceOpInputs(*inputs)
    _, slopes, *metrics = output
    ctx.mark_non_differentiable(slopes, *metrics)
    ctx.nll = given.nll > 0
    tokens = (given.logp, given.divergence, given.token_weight, given.divergence_weight)
    ctx.save_for_backward(slopes, *tokens, given.ref_logp, given.mask, given.cu_seqlens, given.nll_mask)
    ctx.set_materialize_grads(False)


def _backward(namespace: str) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 4
        wanted = list(ctx.needs_input_grad[:4])
        made = ranges.kernels(namespace).preference_backward(grad, *ctx.saved_tensors, ctx.nll, wanted)
        return tuple(x if w else None for x, w in zip(made, wanted, strict=True))

    return backward


def register(namespace: str) -> None:
    """Gives the ops of a namespace their fakes and derivatives."""
    for op, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{op}", fake)
    register_derivative(namespace, "preference", _save, _backward(namespace), 4)
