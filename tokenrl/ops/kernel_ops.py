"""The ops that every kernel backend implements: their arguments, fakes and derivatives.

Tokens are flat [N], sequences are given by cu_seqlens int64 [S + 1]. Logits are [N, V] or [B, T, V], with one id per
row, or K of them in a last dimension of their own. Ops from hidden states are written once over these:
tokenrl/ops/linear_ops.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch.checks import values_known
from ..objectives.metrics import RAW
from . import ranges
from .arguments import OpArguments, schema
from .derivatives import is_last_use, register_derivative

IGNORED = -100  # an id without a result
# Of token_logprobs, in order; those after ALWAYS are empty unless they are asked for. lse_rest is what lse lost when it
# was rounded: with large logits the backward needs it.
RESULTS = (
    "logp", "entropy", "lse", "lse_rest", "log_sum_sq_probs", "mean_logit", "max_prob", "is_top1", "rank",
)  # fmt: skip
ALWAYS = RESULTS[:4]
PER_ID = ("logp", "is_top1", "rank")  # of the shape of ids; the others have that of the rows of logits


@dataclass(frozen=True)
class LogRatio(OpArguments):
    logp: Tensor
    old_logp: Tensor


@dataclass(frozen=True)
class RowInputs(OpArguments):
    """A row of the table on a batch, beside its log-probs. params: a number each, or 0 and a tensor [N] in its place in
    param_tensors."""

    advantages: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor
    starts: Tensor | None
    span_weight: Tensor
    normalizer: Tensor
    token_weight: Tensor | None
    statistic: str
    flow: str
    gate: str
    params: list[float]
    param_tensors: list[Tensor | None]
    clamp: float
    cap: float


@dataclass(frozen=True)
class ObjectiveInputs(RowInputs, LogRatio):
    """Of op objective."""


@dataclass(frozen=True)
class Transform(OpArguments):
    """z = softcap tanh(logit_scale x / softcap) / temperature. An infinite softcap is none; temperatures are one per
    token."""

    temperature: float
    temperatures: Tensor | None
    softcap: float
    logit_scale: float
    keep_mask: Tensor | None


@dataclass(frozen=True)
class Upstream(OpArguments):
    grad_logp: Tensor | None
    grad_entropy: Tensor | None
    grad_lse: Tensor | None
    grad_log_sum_sq_probs: Tensor | None


@dataclass(frozen=True)
class SavedStatistics(OpArguments):
    lse: Tensor
    lse_rest: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor


STATISTICS = "(" + ", ".join(f"Tensor {name}" for name in RESULTS) + ")"
SCHEMAS = {
    "objective": schema(ObjectiveInputs, returns="(Tensor loss, Tensor coef, Tensor metrics)"),
    "statistic": "(Tensor logp, Tensor old_logp, Tensor? mask, Tensor cu_seqlens, Tensor? starts, str statistic, "
    "str flow) -> Tensor",
    "statistic_backward": "(Tensor grad, Tensor? mask, Tensor cu_seqlens, Tensor? starts, str statistic, str flow) "
    "-> Tensor",
    "position_adaptive_clip": "(Tensor log_ratio, Tensor? mask, Tensor cu_seqlens, float[] params, "
    "Tensor?[] param_tensors) -> (Tensor clipped, Tensor inside)",
    "aggregation_weights": "(Tensor? mask, Tensor cu_seqlens, SymInt num_tokens, Tensor? advantages, "
    "Tensor? group_ids, str span, str unit, float scale) -> (Tensor span_weight, Tensor normalizer)",
    "token_logprobs": schema(
        "Tensor logits, Tensor ids", Transform, "str[] outputs, bool inplace_backward", returns=STATISTICS
    ),
    "token_logprobs_backward": schema(
        Upstream, "Tensor logits, Tensor ids", SavedStatistics, Transform, returns="Tensor"
    ),
    "token_logprobs_backward_": schema(
        Upstream, "Tensor(a!) logits, Tensor ids", SavedStatistics, Transform, returns="()"
    ),
}


def _fake_objective(logp, old_logp, advantages, mask, cu_seqlens, starts, span_weight, *rest):
    return logp.new_empty(()), torch.empty_like(logp), logp.new_empty(len(RAW), dtype=torch.float64)


def _fake_weights(mask, cu_seqlens, *rest):
    span_weight = cu_seqlens.new_empty(cu_seqlens.numel() - 1, dtype=torch.float64)
    return span_weight, span_weight.new_empty(())


def logprob_results(logits: Tensor, ids: Tensor, outputs: list[str], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Memory for the results of token_logprobs, of the shape of ids or of the rows of logits; (0,) for those that are
    not asked for."""
    per_id = {"logp": dtype, "is_top1": torch.bool, "rank": ids.dtype}

    def made(name: str) -> Tensor:
        shape = ids.shape if name in PER_ID else logits.shape[:-1]
        return ids.new_empty(shape if name in (*ALWAYS, *outputs) else (0,), dtype=per_id.get(name, dtype))

    return tuple(made(name) for name in RESULTS)


def _fake_logprobs(logits, ids, temperature, temperatures, softcap, logit_scale, keep_mask, outputs, inplace_backward):
    return logprob_results(logits, ids, outputs, torch.promote_types(logits.dtype, torch.float32))


FAKES: dict[str, Callable[..., Any]] = {
    "objective": _fake_objective,
    "statistic": lambda logp, *rest: torch.empty_like(logp),
    "statistic_backward": lambda grad, *rest: torch.empty_like(grad),
    "position_adaptive_clip": lambda x, *rest: (torch.empty_like(x), torch.empty_like(x)),
    "aggregation_weights": _fake_weights,
    "token_logprobs": _fake_logprobs,
    "token_logprobs_backward": lambda g1, g2, g3, g4, logits, *rest: logits.new_empty(logits.shape),
    "token_logprobs_backward_": lambda *args: None,
}


def _save_objective(ctx, inputs, output):
    _, coef, metrics = output
    ctx.mark_non_differentiable(coef, metrics)
    ctx.save_for_backward(coef, inputs[0])
    ctx.set_materialize_grads(False)


def _is_the_gradient(ctx: Any, grad: Tensor) -> bool:
    """Of what was saved for a backward, whose factor then is 1. On a GPU a look were a sync."""
    return is_last_use(ctx) and values_known(grad) and grad.item() == 1


def _objective_backward(namespace: str) -> Callable[..., Any]:
    def backward(ctx, grad_loss, grad_coef, grad_metrics):
        coef, _ = ctx.saved_tensors
        if grad_loss is None:
            return (None,)
        with ranges.around_backward(namespace, "objective", coef):
            return (coef if _is_the_gradient(ctx, grad_loss) else grad_loss * coef,)

    return backward


def _save_clip(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[0])


def _save_statistic(ctx, inputs, output):
    *_, mask, cu_seqlens, starts, ctx.statistic, ctx.flow = inputs
    ctx.save_for_backward(mask, cu_seqlens, starts, inputs[0])
    ctx.set_materialize_grads(False)


def _statistic_backward(namespace: str) -> Callable[..., Any]:
    def backward(ctx, grad):
        if grad is None:
            return (None,)
        *where, _ = ctx.saved_tensors
        op = ranges.kernels(namespace).statistic_backward
        return (op(grad.contiguous(), *where, ctx.statistic, ctx.flow),)

    return backward


def _clip_backward(namespace: str) -> Callable[..., Any]:
    def backward(ctx, grad, _):
        inside, _ = ctx.saved_tensors
        with ranges.around_backward(namespace, "position_adaptive_clip", inside):
            return (torch.where(inside != 0, grad, 0),)

    return backward


def mark_constants(ctx: Any, output: tuple[Tensor, ...]) -> None:
    """The results of token_logprobs that carry no gradient, log_sum_sq_probs among them where it is not asked for."""
    _, entropy, _, lse_rest, log_sum_sq_probs, *constants = output
    if log_sum_sq_probs.shape != entropy.shape:
        constants.append(log_sum_sq_probs)
    ctx.mark_non_differentiable(lse_rest, *constants)


def _save_logprobs(ctx, inputs, output):
    logits, ids, ctx.temperature, temperatures, ctx.softcap, ctx.logit_scale, keep_mask, _, ctx.inplace = inputs
    _, entropy, lse, lse_rest, log_sum_sq_probs, *_ = output
    mark_constants(ctx, output)
    ctx.save_for_backward(logits, ids, lse, lse_rest, entropy, log_sum_sq_probs, temperatures, keep_mask)
    ctx.set_materialize_grads(False)


def _logprobs_backward(namespace: str) -> Callable[..., Any]:
    def backward(ctx, *upstream):
        grad_logp, grad_entropy, grad_lse, _, grad_log_sum_sq_probs, *_ = upstream
        wanted = (grad_logp, grad_entropy, grad_lse, grad_log_sum_sq_probs)
        if all(g is None for g in wanted):
            return (None,)
        logits, *saved, temperatures, keep_mask = ctx.saved_tensors
        grads = [g if g is None else g.contiguous() for g in wanted]
        transform = (ctx.temperature, temperatures, ctx.softcap, ctx.logit_scale, keep_mask)
        ops = ranges.kernels(namespace)
        if not ctx.inplace:
            return (ops.token_logprobs_backward(*grads, logits, *saved, *transform),)
        ops.token_logprobs_backward_(*grads, logits.detach(), *saved, *transform)
        # Whoever else saved these logits, a second backward of this call included, must not take them for logits.
        torch.autograd.graph.increment_version(logits)
        return (logits.detach(),)

    return backward


def register(namespace: str) -> None:
    """Gives the ops of a namespace their fakes and derivatives."""
    for op, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{op}", fake)
    register_derivative(namespace, "objective", _save_objective, _objective_backward(namespace))
    register_derivative(namespace, "statistic", _save_statistic, _statistic_backward(namespace))
    register_derivative(namespace, "position_adaptive_clip", _save_clip, _clip_backward(namespace))
    register_derivative(namespace, "token_logprobs", _save_logprobs, _logprobs_backward(namespace))
