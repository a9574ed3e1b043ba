"""The ops that are written once over the kernels of every backend: schema, fake, derivative and implementation.

Tokens are flat: hidden [N, D], weight [V, D], bias [V], ids [N, K]. keep_mask is [1, V] or [N, V]. compute_dtype names
the dtype of the GEMMs. Gradients that are not wanted are empty, (0,).
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import chunks, contract, tiles
from .contract import SAVED, TRANSFORM, UPSTREAM
from .head import Head
from .products import scaled, sum_dtype

_HEAD = f"{TRANSFORM}, str compute_dtype, int memory_budget"
_STATS = contract.SCHEMAS["token_logprobs"].split(" -> ")[1]
_GRADS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"

SCHEMAS = {
    "linear_token_logprobs": f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, {_HEAD}, str[] outputs, "
    f"Tensor? main_grad) -> {_STATS}",
    "linear_token_logprobs_backward": f"({UPSTREAM}, Tensor hidden, Tensor weight, Tensor? bias, {SAVED}, {_HEAD}, "
    f"bool[] wanted, Tensor(a!)? main_grad) -> ({_GRADS})",
    "linear_policy_loss": f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, {_HEAD}, bool[] wanted, "
    "Tensor? main_grad, Tensor? old_logp, Tensor? advantages, Tensor mask, Tensor cu_seqlens, Tensor? starts, "
    "Tensor span_weight, Tensor normalizer, Tensor? token_weight, Tensor weights, str statistic, str flow, str gate, "
    "float[] params, Tensor?[] param_tensors, float clamp, float cap, Tensor? ref_logp, str kl_gate, "
    "float[] kl_params, float kl_clamp, float kl_cap, float kl_coef, float entropy_coef) -> "
    f"(Tensor loss, Tensor metrics, {_GRADS})",
}


def _head(
    ops, weight: Tensor, bias: Tensor | None, temperature: float, temperatures: Tensor | None, softcap: float,
    logit_scale: float, keep_mask: Tensor | None, compute_dtype: str,
) -> Head:  # fmt: skip
    dtype = getattr(torch, compute_dtype)
    return Head(ops, weight, bias, temperature, temperatures, softcap, logit_scale, keep_mask, dtype)


def _linear_token_logprobs(ops, hidden, weight, bias, ids, *rest):
    *head, memory_budget, outputs, main_grad = rest
    return tiles.statistics(_head(ops, weight, bias, *head), hidden, ids, outputs, memory_budget)


def _linear_token_logprobs_backward(ops, *inputs):
    upstream, (hidden, weight, bias, ids, lse, lse_rest, entropy, squares, *rest) = inputs[:4], inputs[4:]
    *head, memory_budget, wanted, main_grad = rest
    grads = _gradients(hidden, weight, wanted, main_grad)
    saved = (lse, lse_rest, entropy, squares)
    tiles.gradients(_head(ops, weight, bias, *head), upstream, hidden, ids, saved, memory_budget, grads)
    return _results(grads, hidden, bias)


def _linear_policy_loss(ops, hidden, weight, bias, ids, *rest):
    (*head, memory_budget, wanted, main_grad), terms = rest[:9], rest[9:]
    grads = _gradients(hidden, weight, wanted, None, None if main_grad is None else main_grad.dtype)
    found = chunks.Terms(ops, *terms)
    loss, metrics = chunks.run(found, _head(ops, weight, bias, *head), hidden, ids, memory_budget, grads)
    return loss, metrics, *_results(grads, hidden, bias)


def _gradients(
    hidden: Tensor, weight: Tensor, wanted: list[bool], main_grad: Tensor | None, dtype: torch.dtype | None = None
) -> tiles.Gradients:
    """Memory for the gradients that are wanted, that of weight in `dtype`; main_grad is added to."""
    of_hidden = torch.zeros_like(hidden) if wanted[0] else None
    of_weight = None
    if wanted[1]:
        of_weight = torch.empty_like(weight, dtype=dtype) if main_grad is None else main_grad
    sums = weight.new_zeros(weight.shape[0], dtype=sum_dtype(weight.dtype)) if wanted[2] else None
    return tiles.Gradients(of_hidden, of_weight, sums, adds=main_grad is not None)


def _results(grads: tiles.Gradients, like: Tensor, bias: Tensor | None) -> list[Tensor]:
    """What the ops return: nothing for a sum that was added to."""
    of_weight = None if grads.adds else grads.weight
    of_bias = None if grads.bias is None else grads.bias.to(bias.dtype)
    return [like.new_empty(0) if g is None else g for g in (grads.hidden, of_weight, of_bias)]


def _fake_results(hidden, weight, bias, wanted, weight_dtype=None):
    found = (
        torch.empty_like(hidden),
        torch.empty_like(weight, dtype=weight_dtype),
        weight.new_empty(weight.shape[0], dtype=None if bias is None else bias.dtype),
    )
    return [g if want else hidden.new_empty(0) for g, want in zip(found, wanted, strict=True)]


def _fake_statistics(hidden, weight, bias, ids, t, ts, cap, scale, keep, compute_dtype, budget, outputs, main_grad):
    return contract.logprob_results(ids, outputs, sum_dtype(getattr(torch, compute_dtype)))


def _fake_backward(*inputs):
    *_, wanted, main_grad = inputs
    return tuple(_fake_results(*inputs[4:7], [wanted[0], wanted[1] and main_grad is None, wanted[2]]))


def _fake_policy_loss(hidden, weight, bias, ids, *rest):
    compute_dtype, _, wanted, main_grad = rest[5:9]
    loss = hidden.new_empty((), dtype=sum_dtype(getattr(torch, compute_dtype)))
    dtype = None if main_grad is None else main_grad.dtype
    return loss, loss.new_empty(12), *_fake_results(hidden, weight, bias, wanted, dtype)


def _save_statistics(ctx, inputs, output):
    hidden, weight, bias, ids, ctx.temperature, temperatures, *ctx.softcap_and_scale, keep_mask = inputs[:9]
    *ctx.how, _, ctx.main_grad = inputs[9:]
    _, entropy, lse, lse_rest, squares, *_ = output
    contract.mark_constants(ctx, output)
    ctx.save_for_backward(hidden, weight, bias, ids, lse, lse_rest, entropy, squares, temperatures, keep_mask)
    ctx.set_materialize_grads(False)


def _statistics_backward(namespace: str):
    @once_differentiable
    def backward(ctx, *upstream):
        grad_logp, grad_entropy, grad_lse, _, grad_squares, *_ = upstream
        upstream = (grad_logp, grad_entropy, grad_lse, grad_squares)
        wanted, rest = list(ctx.needs_input_grad[:3]), (None,) * 10
        if all(g is None for g in upstream):
            return None, None, None, *rest
        *saved, temperatures, keep_mask = ctx.saved_tensors
        transform = (ctx.temperature, temperatures, *ctx.softcap_and_scale, keep_mask)
        op = getattr(torch.ops, namespace).linear_token_logprobs_backward
        grads = op(*upstream, *saved, *transform, *ctx.how, wanted, ctx.main_grad)
        wanted[1] = wanted[1] and ctx.main_grad is None
        return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *rest

    return backward


def _save_policy_loss(ctx, inputs, output):
    loss, metrics, *grads = output
    ctx.main_grad, ctx.wanted = inputs[12], inputs[11]
    ctx.rest = contract.no_gradients(inputs[3:])
    ctx.mark_non_differentiable(metrics, *grads)
    ctx.save_for_backward(*grads)
    ctx.set_materialize_grads(False)


@once_differentiable
def _policy_loss_backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return None, None, None, *ctx.rest
    of_hidden, of_weight, of_bias = ctx.saved_tensors
    wanted = list(ctx.wanted)
    if wanted[1] and ctx.main_grad is not None:
        ctx.main_grad.addcmul_(of_weight, grad_loss.to(of_weight.dtype))
        wanted[1] = False
    found = zip((of_hidden, of_weight, of_bias), wanted, strict=True)
    return *(scaled(g, grad_loss) if want else None for g, want in found), *ctx.rest


def _eager_numbers(function, namespace: str):
    """The implementation on the kernels of a backend; autocast would cast the tiles behind its back."""

    @functools.wraps(function)
    def run(*inputs):
        device = next(x.device.type for x in inputs if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False), torch.no_grad():
            return tuple(function(getattr(torch.ops, namespace), *inputs))

    return run


_IMPLEMENTATIONS = {
    "linear_token_logprobs": (_linear_token_logprobs, _fake_statistics),
    "linear_token_logprobs_backward": (_linear_token_logprobs_backward, _fake_backward),
    "linear_policy_loss": (_linear_policy_loss, _fake_policy_loss),
}
_LIBRARIES: dict[str, torch.library.Library] = {}


def register(namespace: str) -> None:
    """Gives a namespace of kernels these ops."""
    library = _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
    for op, (function, fake) in _IMPLEMENTATIONS.items():
        library.define(op + SCHEMAS[op])
        for key in ("CPU", "CUDA"):
            library.impl(op, _eager_numbers(function, namespace), key)
        torch.library.register_fake(f"{namespace}::{op}", fake)
    statistics = (_statistics_backward(namespace), _save_statistics)
    contract.register_derivative(namespace, "linear_token_logprobs", *statistics)
    contract.register_derivative(namespace, "linear_policy_loss", _policy_loss_backward, _save_policy_loss)
