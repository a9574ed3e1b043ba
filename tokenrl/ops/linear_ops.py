"""The ops that are written once over the kernels of every backend: schema, fake, derivative and implementation.

Tokens are flat: hidden [N, D], weight [V, D], bias [V], ids [N, K]. keep_mask is [1, V] or [N, V]. compute_dtype names
the dtype of the GEMMs. Gradients that are not wanted are empty, (0,).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..objectives.metrics import RAW
from . import kernel_ops, ranges
from .arguments import schema
from .derivatives import is_last_use, register_derivative
from .kernel_ops import STATISTICS, SavedStatistics, Upstream
from .linear import policy_loss, token_logprobs
from .linear.directions import directions
from .linear.evaluation import LinearPolicyLossInputs
from .linear.gemm import empty_like, multiples, scaled, sum_dtype
from .linear.head import HeadInputs
from .linear.kept import kept_memory
from .linear.main_grad import MainGrad

LOSS = "Tensor loss, Tensor metrics, Tensor logp, Tensor entropy"
GRADS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"

SCHEMAS = {
    "linear_token_logprobs": schema(
        HeadInputs, "str[] outputs, Tensor? main_grad, str keep", returns=f"{STATISTICS[:-1]}, Tensor kept)"
    ),
    "linear_token_logprobs_backward": schema(
        HeadInputs,
        Upstream,
        SavedStatistics,
        "Tensor? logits, bool[] wanted, Tensor(a!)? main_grad",
        returns=f"({GRADS})",
    ),
    "linear_policy_loss": schema(LinearPolicyLossInputs, returns=f"({LOSS}, {GRADS})"),
}


def _linear_token_logprobs(ops, *args):
    inputs, (outputs, main_grad, keep) = HeadInputs.read(args)
    head, kept = inputs.head(ops), kept_memory(inputs, keep)
    given = head, inputs.hidden, inputs.ids, outputs, inputs.memory_budget
    if keep != "directions":
        return *token_logprobs.statistics(*given, kept if keep == "logits" else None), kept
    results = kernel_ops.logprob_results(inputs.hidden, inputs.ids, outputs, sum_dtype(head.dtype))
    logp, *per_row = directions(head, inputs.hidden, inputs.ids.squeeze(1), inputs.memory_budget, kept)
    return logp[:, None], *per_row, *results[len(kernel_ops.ALWAYS) :], kept


def _linear_token_logprobs_backward(ops, *args):
    inputs, rest = HeadInputs.read(args)
    upstream, rest = Upstream.read(rest)
    saved, (logits, wanted, main_grad) = SavedStatistics.read(rest)
    dtypes = dtypes_of(inputs)
    grads = gradients_of(inputs, wanted, dtypes, main_grad)
    token_logprobs.gradients(
        inputs.head(ops), tuple(upstream), inputs.hidden, inputs.ids, tuple(saved), inputs.memory_budget, grads,
        logits,
    )  # fmt: skip
    return results_of(grads, inputs.hidden, dtypes)


def _linear_policy_loss(ops, *args):
    inputs = LinearPolicyLossInputs(*args)
    dtypes = waiting_dtypes(inputs, inputs.main_grad)
    grads = gradients_of(inputs, inputs.wanted, dtypes)
    return *policy_loss.run(ops, inputs, grads), *results_of(grads, inputs.hidden, dtypes)


def dtypes_of(inputs: HeadInputs) -> list[torch.dtype]:
    """Of the gradients of hidden, weight and bias."""
    return [(x if x is not None else inputs.weight).dtype for x in (inputs.hidden, inputs.weight, inputs.bias)]


def waiting_dtypes(inputs: HeadInputs, main_grad: Tensor | None = None) -> list[torch.dtype]:
    """The same of those that wait for the upstream gradient and may be too small for fp16; the weight's is that of
    main_grad."""
    found = [torch.float32 if dtype == torch.float16 else dtype for dtype in dtypes_of(inputs)]
    if main_grad is not None:
        found[1] = main_grad.dtype
    return found


def gradients_of(
    inputs: HeadInputs, wanted: list[bool], dtypes: list[torch.dtype], main_grad: Tensor | None = None
) -> token_logprobs.Gradients:
    """Memory for the gradients that are wanted; main_grad is added to."""
    hidden, weight = inputs.hidden, inputs.weight
    of_hidden = torch.zeros_like(hidden, dtype=dtypes[0]) if wanted[0] else None
    of_weight = None
    if wanted[1]:
        of_weight = empty_like(weight, dtypes[1]) if main_grad is None else main_grad
    sums = weight.new_zeros(weight.shape[0], dtype=sum_dtype(weight.dtype)) if wanted[2] else None
    return token_logprobs.Gradients(of_hidden, of_weight, sums, adds=main_grad is not None)


def results_of(grads: token_logprobs.Gradients, like: Tensor, dtypes: list[torch.dtype]) -> list[Tensor]:
    """What the ops return: nothing for a sum that was added to."""
    of_weight = None if grads.adds else grads.weight
    of_bias = None if grads.bias is None else grads.bias.to(dtypes[2])
    return [like.new_empty(0) if g is None else g for g in (grads.hidden, of_weight, of_bias)]


def fake_results(inputs: HeadInputs, wanted: list[bool], dtypes: list[torch.dtype]) -> list[Tensor]:
    hidden, weight = inputs.hidden, inputs.weight
    found = (
        torch.empty_like(hidden, dtype=dtypes[0]),
        torch.empty_like(weight, dtype=dtypes[1]),
        weight.new_empty(weight.shape[0], dtype=dtypes[2]),
    )
    return [g if want else hidden.new_empty(0) for g, want in zip(found, wanted, strict=True)]


def _fake_statistics(*args):
    inputs, (outputs, _, keep) = HeadInputs.read(args)
    results = kernel_ops.logprob_results(inputs.hidden, inputs.ids, outputs, sum_dtype(inputs.dtype))
    return *results, kept_memory(inputs, keep)


def _fake_backward(*args):
    inputs, (*_, wanted, main_grad) = HeadInputs.read(args)
    wanted = [wanted[0], wanted[1] and main_grad is None, wanted[2]]
    return tuple(fake_results(inputs, wanted, dtypes_of(inputs)))


def fake_policy_loss(*args):
    inputs, _ = LinearPolicyLossInputs.read(args)
    loss = inputs.hidden.new_empty((), dtype=sum_dtype(inputs.dtype))
    logp, entropy = (loss.new_empty(inputs.ids.shape[0]) for _ in range(2))
    metrics = loss.new_empty(len(RAW) + 3, dtype=torch.float64)
    return loss, metrics, logp, entropy, *fake_results(inputs, inputs.wanted, waiting_dtypes(inputs, inputs.main_grad))


def _save_statistics(ctx, inputs, output):
    head, (_, main_grad, ctx.keep) = HeadInputs.read(inputs)
    ctx.main_grad = MainGrad.of(main_grad, head.weight)
    _, entropy, lse, lse_rest, squares, *_, kept = output
    kernel_ops.mark_constants(ctx, output)
    ctx.softcap, ctx.logit_scale, ctx.temperature = head.softcap, head.logit_scale, head.temperature
    ctx.compute_dtype, ctx.memory_budget = head.compute_dtype, head.memory_budget
    ctx.save_for_backward(
        head.hidden, head.weight, head.bias, head.ids, head.temperatures, head.keep_mask, lse, lse_rest, entropy,
        squares, kept,
    )  # fmt: skip
    ctx.set_materialize_grads(False)


def _statistics_backward(namespace: str) -> Callable[..., Any]:
    def backward(ctx, *upstream):
        grad_logp, grad_entropy, grad_lse, _, grad_squares, *_ = upstream
        wanted_of = Upstream(grad_logp, grad_entropy, grad_lse, grad_squares)
        if all(g is None for g in wanted_of):
            return None, None, None
        hidden, weight, bias, ids, temperatures, keep_mask, *saved, kept = ctx.saved_tensors
        if ctx.keep == "directions" and all(g is None for g in (grad_entropy, grad_lse, grad_squares)):
            with ranges.around_backward(namespace, "directions", kept):
                return multiples(kept, grad_logp.squeeze(1)).to(hidden.dtype), None, None
        head = HeadInputs(
            hidden, weight, bias, ids, ctx.temperature, temperatures, ctx.softcap, ctx.logit_scale, keep_mask,
            ctx.compute_dtype, ctx.memory_budget,
        )  # fmt: skip
        wanted = list(ctx.needs_input_grad[:3])
        op = ranges.kernels(namespace).linear_token_logprobs_backward
        logits = kept if ctx.keep == "logits" else None
        total = None if ctx.main_grad is None else ctx.main_grad.total
        grads = list(op(*head, *wanted_of, *saved, logits, wanted, total))
        if wanted[1] and ctx.main_grad is not None:
            grads[1] = ctx.main_grad.beside()
        return tuple(g if want else None for g, want in zip(grads, wanted, strict=True))

    return backward


def save_policy_loss(ctx, inputs, output):
    """inputs: those of the op; others may follow."""
    loss, metrics, logp, entropy, *grads = output
    given, _ = LinearPolicyLossInputs.read(inputs)
    ctx.main_grad, ctx.wanted = MainGrad.of(given.main_grad, given.weight), given.wanted
    ctx.mark_non_differentiable(metrics, logp, entropy, *grads)
    ctx.save_for_backward(*grads, given.hidden, given.weight, given.bias)
    ctx.set_materialize_grads(False)


def policy_loss_backward(namespace: str) -> Callable[..., Any]:
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None, None, None
        saved = ctx.saved_tensors
        with ranges.around_backward(namespace, "linear_policy_loss", *saved[3:5]):
            return _times_upstream(ctx, grad_loss, *saved)

    return backward


def _times_upstream(ctx, grad_loss, *saved):
    *grads, hidden, weight, bias = saved
    added = ctx.wanted[1] and ctx.main_grad is not None
    wanted = (ctx.wanted[0], ctx.wanted[1] and not added, ctx.wanted[2])
    found, last = zip(grads, (hidden, weight, bias), wanted, strict=True), is_last_use(ctx)
    of_hidden, of_weight, of_bias = (scaled(g, grad_loss, x.dtype, last) if want else None for g, x, want in found)
    return of_hidden, ctx.main_grad.add(grads[1], grad_loss) if added else of_weight, of_bias


def eager_numbers(function: Callable[..., Any], namespace: str) -> Callable[..., Any]:
    """The implementation on the kernels of a backend; autocast would cast the tiles behind its back."""

    @functools.wraps(function)
    def run(*inputs):
        device = next(x.device.type for x in inputs if isinstance(x, Tensor))
        ops = ranges.kernels(namespace)
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled(device):
            return tuple(function(ops, *inputs))  # entering and leaving costs as much as a small kernel
        with torch.autocast(device, enabled=False), torch.no_grad():
            return tuple(function(ops, *inputs))

    return run


_IMPLEMENTATIONS = {
    "linear_token_logprobs": (_linear_token_logprobs, _fake_statistics),
    "linear_token_logprobs_backward": (_linear_token_logprobs_backward, _fake_backward),
    "linear_policy_loss": (_linear_policy_loss, fake_policy_loss),
}
HOST_READS = torch.Tag.cudagraph_unsafe  # which rows there are: the host waits for it, and no graph can
_LIBRARIES: dict[str, torch.library.Library] = {}


def register(namespace: str) -> None:
    """Gives a namespace of kernels these ops."""
    library = _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
    for op, (function, fake) in _IMPLEMENTATIONS.items():
        library.define(op + SCHEMAS[op], tags=HOST_READS)
        for key in ("CPU", "CUDA"):
            library.impl(op, eager_numbers(function, namespace), key)
        torch.library.register_fake(f"{namespace}::{op}", fake)
    register_derivative(namespace, "linear_token_logprobs", _save_statistics, _statistics_backward(namespace), 3)
    register_derivative(namespace, "linear_policy_loss", save_policy_loss, policy_loss_backward(namespace), 3)
