"""linear_topk_distillation_loss: over K ids of each token from the student's hidden states, in one pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_tensor
from ..errors import wrong
from ..logprobs.from_hidden import head_arguments, linear_token_logprobs
from ..logprobs.from_logits import check_ids
from ..logprobs.topk import topk_token_divergence
from ..objectives.distillation import Distillation
from ..observed import observed
from ..ops import backends, ranges
from ..ops.derivatives import transformed
from ..ops.kernel_ops import IGNORED
from ..ops.linear import one_pass
from ..ops.linear.gemm import weighed_sum
from ..ops.linear.head import HeadInputs, Rows
from ..ops.linear_ops import gradients_of, waiting_dtypes
from .distillation import Temperature, weighed_tokens


@observed
def linear_topk_distillation_loss(
    objective: str | Distillation,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    other_logp_topk: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: Tensor | None = None,
    aggregation: str | None = None,
    normalizer: float | Tensor | None = None,
    temperature: Temperature = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    topk_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
    **lists: Any,
) -> tuple[Tensor, Tensor]:
    """topk_distillation_loss from the student's hidden states, with its gradients, in one pass over chunks of tokens.

    Tokens that are masked or weigh nothing enter no GEMM. The forward makes the gradients of hidden, weight and bias, 6
    N D V flops, and the backward multiplies; in a trace by torch.compile and under torch.func it is
    linear_token_logprobs with 8.

    Of a head on one process. Where its rows lie on several ranks it is topk_distillation_loss of the log-probs of
    linear_token_logprobs(hidden, weight, ids, vocab=...), with 8 flops.

    Args:
        objective: as for distillation_loss.
        hidden: the student's, [B, T, D], or packed [N, D] with cu_seqlens.
        weight: [V, D].
        ids: integers [B, T, K] or [N, K].
        other_logp_topk: fp32 or fp64 of their shape, the teacher's log-probs of these ids, a constant.
        bias: [V].
        mask: bool of the tokens that pay; masked rows may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        token_weight: of the tokens, or [B, 1].
        aggregation: as for policy_loss, without groups; None takes the objective's own.
        normalizer: as for policy_loss.
        temperature: as for linear_token_logprobs; for the row's T^power, too.
        softcap: as for linear_token_logprobs, and so are logit_scale, keep_mask, compute_dtype and memory_budget.
        logit_scale: a number.
        keep_mask: bool [V], or of each row.
        topk_mask: bool of the shape of ids, as for topk_token_divergence.
        compute_dtype: of the GEMMs.
        memory_budget: bytes of the chunks.
        backend: as for policy_loss.
        lists: rest, limits, tail_floor, logp_floor, outside_logp of topk_token_divergence; the entropy of
            "zero_outside" is made here.

    Returns:
        As distillation_loss.
    """
    row, layout, weights = weighed_tokens(
        objective, "hidden", hidden, compute_dtype, mask, cu_seqlens, token_weight, aggregation, normalizer,
        temperature, backend,
    )  # fmt: skip
    options = (temperature, softcap, logit_scale, keep_mask, compute_dtype, memory_budget, None)
    head = head_arguments(hidden, weight, bias, *options)
    check_ids(head.like, ids, ["logp"])
    _check(ids, other_logp_topk, topk_mask, lists)
    chosen = backends.choose(backend, hidden.device)
    pays = (layout.valid() & (weights != 0)).view(layout.shape)
    terms = _terms(row, weights, other_logp_topk.to(weights.dtype), topk_mask, lists)
    if chosen.is_reference or transformed():
        how: dict[str, Any] = dict(
            zip(("temperature", "softcap", "logit_scale", "keep_mask", "compute_dtype"), options, strict=False)
        )
        stats = linear_token_logprobs(hidden, weight, ids, bias=bias, row_mask=pays, backend=backend, **how)
        values = terms(slice(None), stats.logp.flatten(0, -2), stats.entropy.flatten())
        return weighed_sum(weights, values), values.detach().view(layout.shape)
    loss, values = _one_pass(
        ranges.kernels(str(chosen.namespace)), head.inputs(ids, pays, IGNORED), terms, weights, (hidden, weight, bias)
    )
    return loss, values.view(layout.shape)


def _terms(
    row: Distillation, weights: Tensor, other: Tensor, topk_mask: Tensor | None, lists: dict[str, Any]
) -> Callable[[Rows, Tensor, Tensor], Tensor]:
    """Of some rows, their log-probs [n, K] and entropies [n]: the divergences, 0 of rows that weigh nothing."""
    other, k = other.flatten(0, -2), other.shape[-1]
    kept = None if topk_mask is None else topk_mask.reshape(-1, k)
    whole = lists.get("rest") == "zero_outside" and row.divergence.name == "reverse_kl"

    def terms(at: Rows, logp: Tensor, entropy: Tensor) -> Tensor:
        more: dict[str, Any] = {"entropy": entropy} if whole else {}
        more |= {} if kept is None else {"topk_mask": kept[at]}
        return topk_token_divergence(logp, other[at], row.divergence, row_mask=weights[at] != 0, **more, **lists)

    return terms


def _one_pass(
    ops: Any, inputs: HeadInputs, terms: Callable[..., Tensor], weights: Tensor, tensors: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor]:
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]

    def differentiated(at: Rows, logp: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with torch.set_grad_enabled(any(wanted)):
            leaves = [x.detach().requires_grad_(any(wanted)) for x in (logp, entropy)]
            values = terms(at, *leaves)
            total = weighed_sum(weights[at], values)
            by = torch.autograd.grad(total, leaves, allow_unused=True) if any(wanted) else (None, None)
        return values.detach(), *by

    with torch.no_grad(), torch.autocast(inputs.hidden.device.type, enabled=False):  # as eager_numbers of the ops
        dtypes = waiting_dtypes(inputs)
        grads = gradients_of(inputs, wanted, dtypes)
        values = one_pass.run(ops, inputs, differentiated, grads)
        loss = weighed_sum(weights, values)
    if not any(wanted):
        return loss, values
    of_hidden = None if grads.hidden is None else grads.hidden.view(tensors[0].shape)  # type: ignore[union-attr]
    carrying = one_pass.with_gradients("linear_topk_distillation_loss")
    return carrying.apply(loss, None, *tensors, of_hidden, grads.weight, grads.bias), values


def _check(ids: Tensor, other: Tensor, topk_mask: Tensor | None, lists: dict[str, Any]) -> None:
    check_constant("other_logp_topk", other)
    if other.shape != ids.shape or ids.dim() < 2 or not other.is_floating_point():
        raise wrong("other_logp_topk", f"{other.dtype} {list(other.shape)}", f"float32 or float64 {list(ids.shape)}")
    if topk_mask is not None:
        check_tensor("topk_mask", topk_mask)
        if topk_mask.dtype != torch.bool or topk_mask.shape != ids.shape:
            raise wrong("topk_mask", f"{topk_mask.dtype} {list(topk_mask.shape)}", f"bool {list(ids.shape)}")
    if "entropy" in lists:
        raise wrong("entropy", "a tensor", "none: it is made here")
