"""Which code runs a call: the op contract (schema, fake, autograd), the reasons why a backend cannot run, and the
choice.

Every kernel backend implements the same ops; tokens are flat [N], sequences are given by cu_seqlens int64 [S + 1].
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .errors import unknown

SCHEMAS = {
    "objective": "(Tensor logp, Tensor old_logp, Tensor? advantages, Tensor? mask, Tensor cu_seqlens, Tensor? starts, "
    "Tensor span_weight, Tensor normalizer, Tensor? token_weight, str statistic, str flow, str gate, float[] params, "
    "Tensor?[] param_tensors, float clamp, float cap) -> (Tensor loss, Tensor coef, Tensor metrics)",
    "statistic": "(Tensor logp, Tensor old_logp, Tensor? mask, Tensor cu_seqlens, Tensor? starts, str statistic) -> Tensor",
    "statistic_backward": "(Tensor grad, Tensor? mask, Tensor cu_seqlens, Tensor? starts, str statistic, str flow) -> Tensor",
    "position_adaptive_clip": "(Tensor log_ratio, Tensor? mask, Tensor cu_seqlens, float[] params, Tensor?[] param_tensors) "
    "-> (Tensor clipped, Tensor inside)",
    "aggregation_weights": "(Tensor? mask, Tensor cu_seqlens, int num_tokens, Tensor? advantages, Tensor? group_ids, str span, "
    "str unit) -> (Tensor span_weight, Tensor count)",
    "token_logprobs": "(Tensor logits, Tensor ids, float temperature) -> (Tensor logp, Tensor entropy, Tensor lse)",
    "token_logprobs_backward": "(Tensor? grad_logp, Tensor? grad_entropy, Tensor logits, Tensor ids, Tensor lse, Tensor entropy, "
    "float temperature) -> Tensor",
}


@dataclass(frozen=True)
class Backend:
    """One way to run the ops. namespace: of its ops under torch.ops, None for the reference. why_not: the reason why
    it cannot run
    on a device, or None. automatic: whether a call that names no backend may get it."""

    name: str
    namespace: str | None
    why_not: Callable[[torch.device], str | None]
    automatic: Callable[[torch.device], bool] = lambda device: True

    @property
    def ops(self):
        return getattr(torch.ops, self.namespace)

    @property
    def aggregation_weights(self):
        return reference.aggregation_weights if self.namespace is None else self.ops.aggregation_weights


def choose(name: str | None, device: torch.device) -> Backend:
    """The backend for a call on `device`: the named one, else TOKENRL_BACKEND, else the first that can run it."""
    name = name or os.environ.get("TOKENRL_BACKEND") or None
    if name is not None:
        if name not in BACKENDS:
            raise unknown("backend", name, BACKENDS)
        reason = BACKENDS[name].why_not(device)
        if reason is None:
            return BACKENDS[name]
        raise RuntimeError(f"backend {name!r} cannot run on {device.type}: {reason}\n{reasons(device)}")
    for backend in BACKENDS.values():
        if backend.automatic(device) and backend.why_not(device) is None:
            return backend
    raise RuntimeError(f"no backend can run on {device.type}:\n{reasons(device)}")


def reasons(device: torch.device) -> str:
    """One line per backend: whether it can run on `device`, or why not."""
    return "\n".join(f"  {name}: {b.why_not(device) or 'can run'}" for name, b in BACKENDS.items())


def _load_native() -> str | None:
    """Loads the C++ op library; the reason if there is none."""
    library = Path(__file__).with_name("_ops.so")
    if not library.exists():
        built = importlib.util.find_spec("tokenrl._build")
        reason = getattr(importlib.import_module("tokenrl._build"), "NATIVE_REASON", None) if built else None
        return reason or f"the extension is not built ({library.name} is missing; pip install . builds it)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


def _load_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        from . import triton_kernels  # noqa: F401  (defines torch.ops.tokenrl_triton)
    except ImportError as error:
        return f"triton does not import: {error}"
    return None


NATIVE_REASON = _load_native()
TRITON_REASON = _load_triton()


def _why_not_native(kind: str) -> Callable[[torch.device], str | None]:
    missing = NATIVE_REASON
    if not missing and not torch._C._dispatch_has_kernel_for_dispatch_key("tokenrl::objective", kind.upper()):
        missing = "built without CUDA (no nvcc was found, or TOKENRL_CUDA=0)"

    def why_not(device: torch.device) -> str | None:
        if missing:
            return missing
        return None if device.type == kind else f"runs {kind} tensors, these are on {device.type}"

    return why_not


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_triton(device: torch.device) -> str | None:
    if TRITON_REASON:
        return TRITON_REASON
    if device.type == "cuda" or (device.type == "cpu" and interpreting()):
        return None
    return f"runs cuda tensors, these are on {device.type} (the interpreter, TRITON_INTERPRET=1, runs cpu tensors)"


BACKENDS = {
    "cuda": Backend("cuda", "tokenrl", _why_not_native("cuda")),
    "cpu": Backend("cpu", "tokenrl", _why_not_native("cpu")),
    "triton": Backend("triton", "tokenrl_triton", _why_not_triton, automatic=lambda device: device.type == "cuda"),
    "reference": Backend("reference", None, lambda device: None),
}


def _fake_objective(logp, old_logp, advantages, mask, cu_seqlens, starts, span_weight, *rest):
    return logp.new_empty(()), torch.empty_like(logp), logp.new_empty(9)


def _fake_weights(mask, cu_seqlens, *rest):
    return cu_seqlens.new_empty(cu_seqlens.numel() - 1, dtype=torch.float64), cu_seqlens.new_empty(
        (), dtype=torch.int64
    )


def _fake_logprobs(logits, ids, temperature):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return tuple(ids.new_empty(ids.shape, dtype=dtype) for _ in range(3))


FAKES = {
    "objective": _fake_objective,
    "statistic": lambda logp, *rest: torch.empty_like(logp),
    "statistic_backward": lambda grad, *rest: torch.empty_like(grad),
    "position_adaptive_clip": lambda x, *rest: (torch.empty_like(x), torch.empty_like(x)),
    "aggregation_weights": _fake_weights,
    "token_logprobs": _fake_logprobs,
    "token_logprobs_backward": lambda gl, ge, logits, *rest: logits.new_empty(logits.shape),
}


def _no_gradients(inputs) -> tuple:
    """What a backward returns for inputs without gradient: torch wants a list for each list of tensors (an empty list is one)."""
    lists = (isinstance(x, (list, tuple)) and all(isinstance(y, Tensor) for y in x) for x in inputs)
    return tuple([None] * len(x) if is_list else None for x, is_list in zip(inputs, lists, strict=True))


def _save_objective(ctx, inputs, output):
    _, coef, metrics = output
    ctx.rest = _no_gradients(inputs[1:])
    ctx.mark_non_differentiable(coef, metrics)
    ctx.save_for_backward(coef)
    ctx.set_materialize_grads(False)


@once_differentiable
def _objective_backward(ctx, grad_loss, grad_coef, grad_metrics):
    (coef,) = ctx.saved_tensors
    grad = None if grad_loss is None else grad_loss * coef
    return grad, *ctx.rest


def _save_clip(ctx, inputs, output):
    ctx.rest = _no_gradients(inputs[1:])
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


@once_differentiable
def _clip_backward(ctx, grad, _):
    (inside,) = ctx.saved_tensors
    return torch.where(inside != 0, grad, 0), *ctx.rest


def _save_logprobs(ctx, inputs, output):
    logits, ids, ctx.temperature = inputs
    _, entropy, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(logits, ids, lse, entropy)
    ctx.set_materialize_grads(False)


def _logprobs_backward(namespace: str):
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy, grad_lse):
        if grad_logp is None and grad_entropy is None:
            return None, None, None
        logits, ids, lse, entropy = ctx.saved_tensors
        grads = [g if g is None else g.contiguous() for g in (grad_logp, grad_entropy)]
        op = getattr(torch.ops, namespace).token_logprobs_backward
        return op(*grads, logits, ids, lse, entropy, ctx.temperature), None, None

    return backward


def register(namespace: str) -> None:
    """Gives the ops of a namespace their fakes and derivatives."""
    for op, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{op}", fake)
    derivatives = {
        "objective": (_objective_backward, _save_objective),
        "position_adaptive_clip": (_clip_backward, _save_clip),
        "token_logprobs": (_logprobs_backward(namespace), _save_logprobs),
    }
    for op, (backward, save) in derivatives.items():
        torch.library.register_autograd(f"{namespace}::{op}", backward, setup_context=save)


if NATIVE_REASON is None:
    register("tokenrl")
if TRITON_REASON is None:
    register("tokenrl_triton")
