"""One function per op: the reference, or a backend's kernels, with their derivative. What is above here knows neither.

Tensors are checked and flat; a layout says where they lie (tokenrl/batch/layout.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..batch.layout import Layout
from ..objectives.forms.base import Form, FormInputs
from ..objectives.gates.base import Bound, Gate
from ..objectives.gates.kl import estimates
from ..objectives.policy import Objective, find_objective
from . import ranges, reference
from .backends import Backend
from .derivatives import call
from .kernel_ops import IGNORED, ObjectiveInputs
from .linear import kept
from .linear.evaluation import LinearPolicyLossInputs
from .linear.head import HeadInputs
from .reference import regularized

# sum_t w_t x_t, as k1 of x to 0: the entropy bonus, weighed by the kernel that weighs the objective.
ITSELF = replace(find_objective("kl_k1"), clamp=math.inf)
RATIO = find_objective("ratio")


@dataclass(frozen=True)
class SpanWeights:
    """span_weight: float64 [S]. normalizer: float64, 0-d; the weight of a sequence's tokens is their quotient,
    0 / 0 = 0."""

    span_weight: Tensor
    normalizer: Tensor


@dataclass(frozen=True)
class Regularizers:
    """What a loss has beside its objective. kl: a row of the table; ref_logp None: no KL term; kl_ratio: the statistic
    of the ratio that the KL is multiplied by, None: of none. *_weight: flat, the term's own weights; None: those of
    the objective."""

    ref_logp: Tensor | None
    kl: Objective
    kl_coef: float
    kl_weight: Tensor | None
    kl_ratio: str | None
    entropy_coef: float
    entropy_weight: Tensor | None

    @property
    def wanted(self) -> bool:
        return self.entropy_coef != 0 or (self.ref_logp is not None and self.kl_coef != 0)


@dataclass(frozen=True)
class PolicyLossInputs:
    """An objective on a batch: checked, flat tensors. gate, form: those of the row, their tensors flat. old_logp None:
    on-policy. advantages: [S] or [N]; per_row: [S], None where they are one per token."""

    row: Objective
    gate: Gate
    form: Form | None
    old_logp: Tensor | None
    advantages: Tensor | None
    per_row: Tensor | None
    token_weight: Tensor | None
    starts: Tensor | None
    group_ids: Tensor | None
    aggregation: str
    weights: SpanWeights
    regularizers: Regularizers

    def beside(self, row: Objective, weight: Tensor | None) -> "PolicyLossInputs":
        """Another term, as an objective of single tokens: under weights of its own, or those of this one."""
        term = replace(self, row=row, gate=row.gate, form=None, advantages=None, starts=None)
        if weight is None:
            return term
        own = SpanWeights(torch.ones_like(self.weights.span_weight), torch.ones_like(self.weights.normalizer))
        return replace(term, weights=own, token_weight=weight)


def statistic(
    chosen: Backend, layout: Layout, logp: Tensor, old_logp: Tensor, starts: Tensor | None, statistic: str, flow: str
) -> Tensor:
    """The statistic of logp - old_logp over each token's span, flat [N], zero in masked cells."""
    if chosen.is_reference:
        return reference.statistic(
            logp, old_logp, layout.valid(), layout.cu_seqlens, starts, statistic, flow, layout.width
        )
    return call(
        chosen.namespace, "statistic", logp, old_logp, layout.mask, layout.cu_seqlens, starts, statistic, flow
    )  # fmt: skip


def position_adaptive_clip(
    chosen: Backend, layout: Layout, log_ratio: Tensor, eps_low: Bound, eps_high: Bound, power: Bound
) -> Tensor:
    """clip(x_t, -eps_low t^power, eps_high t^power), flat [N], zero in masked cells."""
    if chosen.is_reference:
        mask, cu_seqlens = layout.valid(), layout.cu_seqlens
        return reference.position_adaptive_clip(log_ratio, mask, cu_seqlens, eps_low, eps_high, power, layout.width)
    numbers, tensors = _split((eps_low, eps_high, power))
    op = "position_adaptive_clip"
    clipped, _ = call(chosen.namespace, op, log_ratio, layout.mask, layout.cu_seqlens, numbers, tensors)
    return clipped


def aggregation_weights(
    chosen: Backend, layout: Layout, advantages: Tensor | None, group_ids: Tensor | None, span: str, unit: str,
    scale: float,
) -> SpanWeights:  # fmt: skip
    """The normalizer is scale times the count of the unit; advantages flat [S] or [N]."""
    run = reference.aggregation_weights
    if chosen.namespace is not None:
        run = ranges.kernels(chosen.namespace).aggregation_weights
    return SpanWeights(
        *run(layout.mask, layout.cu_seqlens, layout.num_tokens, advantages, group_ids, span, unit, scale)
    )


def token_logprobs(chosen: Backend, *inputs: Any) -> tuple[Tensor, ...]:
    """The results of op token_logprobs, in its order."""
    if chosen.is_reference:
        return reference.token_logprobs(*inputs)
    return call(chosen.namespace, "token_logprobs", *inputs)


def linear_token_logprobs(
    chosen: Backend, head: HeadInputs, outputs: list[str], main_grad: Tensor | None, keep: str
) -> tuple[Tensor, ...]:
    """The results of op token_logprobs from hidden states. keep: of to_keep."""
    inputs = (*head, outputs, main_grad)
    if chosen.is_reference:
        return reference.linear_token_logprobs(*inputs)
    return call(chosen.namespace, "linear_token_logprobs", *inputs, keep)[:-1]


def to_keep(chosen: Backend, head: HeadInputs, *, logp_alone: bool = False) -> str:
    """What the forward of linear_token_logprobs keeps for its backward (tokenrl/ops/linear/kept.py)."""
    return "nothing" if chosen.is_reference else kept.to_keep(head, wanted(head), logp_alone)


def wanted(head: HeadInputs) -> list[bool]:
    """Of which of hidden, weight and bias there will be a gradient."""
    tensors = (head.hidden, head.weight, head.bias)
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]


def policy_loss(
    chosen: Backend, layout: Layout, logp: Tensor, entropy: Tensor | None, inputs: PolicyLossInputs
) -> tuple[Tensor, Tensor]:
    """(loss, raw metrics [12] of the objective; then, where there is an entropy or a reference, sum_t w_t kl_t and
    sum_t w_t entropy_t, [14])."""
    extra = inputs.regularizers
    old_logp = logp.detach() if inputs.old_logp is None else inputs.old_logp
    loss, raw = _objective(chosen, layout, logp, old_logp, inputs)
    if entropy is None and extra.ref_logp is None:
        return loss, raw
    kl = bonus = None
    if extra.ref_logp is not None:
        kl = _kl(chosen, layout, logp, old_logp, extra.ref_logp, inputs)
    if entropy is not None:
        bonus, _ = _row(chosen, layout, entropy, torch.zeros_like(entropy), inputs.beside(ITSELF, extra.entropy_weight))
    zero = raw.new_zeros(())
    sums = torch.stack([zero if x is None else x.detach().to(raw.dtype) for x in (kl, bonus)])
    return regularized(loss, kl, extra.kl_coef, bonus, extra.entropy_coef), torch.cat([raw, sums])


def _kl(
    chosen: Backend, layout: Layout, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, inputs: PolicyLossInputs
) -> Tensor:
    """The KL term; of r k the gradient is r dk + k dr."""
    extra, row, valid = inputs.regularizers, inputs.row, layout.valid()
    term = inputs.beside(extra.kl, extra.kl_weight)
    if extra.kl_ratio is None:
        return _row(chosen, layout, logp, ref_logp, term)[0]
    now = logp.detach()
    k = estimates(extra.kl.gate, now, ref_logp, valid, extra.kl.clamp, extra.kl.cap)
    x = (now - old_logp).clamp(-row.clamp, row.clamp)
    r = statistic(chosen, layout, x, torch.zeros_like(x), inputs.starts, extra.kl_ratio, "through").exp()
    weighed = replace(term, token_weight=r if term.token_weight is None else r * term.token_weight)
    through_kl, _ = _row(chosen, layout, logp, ref_logp, weighed)
    plain = replace(RATIO, statistic=extra.kl_ratio, clamp=row.clamp)
    of_ratio = replace(term, row=plain, gate=plain.gate, advantages=-k, starts=inputs.starts)
    through_ratio, _ = _row(chosen, layout, logp, old_logp, of_ratio)
    return through_kl + through_ratio - through_ratio.detach()


def _objective(
    chosen: Backend, layout: Layout, logp: Tensor, old_logp: Tensor, inputs: PolicyLossInputs
) -> tuple[Tensor, Tensor]:
    """(loss, raw metrics) of the row, and of the form around it."""
    if inputs.form is None:
        return _row(chosen, layout, logp, old_logp, inputs)

    def run_row(logp: Tensor, old_logp: Tensor, gate: Gate, token_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        return _row(chosen, layout, logp, old_logp, replace(inputs, gate=gate, token_weight=token_weight))

    def statistic_of(x: Tensor, name: str) -> Tensor:
        return statistic(chosen, layout, x, torch.zeros_like(x), inputs.starts, name, "through")

    valid, clamp = layout.valid(), inputs.row.clamp
    x = torch.where(valid, logp - old_logp, 0).clamp(-clamp, clamp)
    advantages = layout.per_token(inputs.advantages, logp.detach())
    return inputs.form.evaluate(
        FormInputs(
            layout, logp, old_logp, valid, x, advantages, inputs.per_row, inputs.token_weight, inputs.starts,
            inputs.group_ids, inputs.aggregation, inputs.weights.normalizer, inputs.gate, run_row, statistic_of,
        )
    )  # fmt: skip


def _row(
    chosen: Backend, layout: Layout, logp: Tensor, old_logp: Tensor, inputs: PolicyLossInputs
) -> tuple[Tensor, Tensor]:
    row, weights = inputs.row, inputs.weights
    if chosen.is_reference:
        return reference.objective(
            logp, old_logp, inputs.advantages, layout.valid(), layout.cu_seqlens, inputs.starts, weights.span_weight,
            weights.normalizer, inputs.token_weight, row.statistic, row.flow, inputs.gate, row.clamp, row.cap,
            layout.width,
        )  # fmt: skip
    numbers, tensors = _split(inputs.gate.params())
    loss, _, metrics = call(
        chosen.namespace, "objective", *ObjectiveInputs(
            logp, old_logp, inputs.advantages, layout.mask, layout.cu_seqlens, inputs.starts, weights.span_weight,
            weights.normalizer, inputs.token_weight, row.statistic, row.flow, inputs.gate.name, numbers, tensors,
            row.clamp, row.cap,
        )
    )  # fmt: skip
    return loss, metrics


def _split(params: Sequence[Bound]) -> tuple[list[float], list[Tensor | None]]:
    """Gate parameters as the ops take them: a number each, or 0 and a tensor in its place."""
    tensors = [p.contiguous() if isinstance(p, Tensor) else None for p in params]
    return [0.0 if isinstance(p, Tensor) else float(p) for p in params], tensors


def linear_policy_loss(
    chosen: Backend, layout: Layout, head: HeadInputs, main_grad: Tensor | None, inputs: PolicyLossInputs
) -> tuple[Tensor, ...]:
    """(loss, raw metrics [15] of policy_loss from hidden states, with the number of passes over the logits, log-probs
    [N], entropies [N])."""
    if not in_one_op(chosen, inputs):
        return _two_ops(chosen, layout, head, main_grad, inputs)
    return call(chosen.namespace, "linear_policy_loss", *one_op_inputs(layout, head, main_grad, inputs))[:4]


def in_one_op(chosen: Backend, inputs: PolicyLossInputs) -> bool:
    """Whether the loss is op linear_policy_loss, or torch around the log-probs of linear_token_logprobs."""
    return not chosen.is_reference and inputs.form is None


def one_op_inputs(
    layout: Layout, head: HeadInputs, main_grad: Tensor | None, inputs: PolicyLossInputs
) -> LinearPolicyLossInputs:
    row, weights, extra = inputs.row, inputs.weights, inputs.regularizers
    advantages = inputs.advantages
    if advantages is not None and advantages.numel() != layout.num_tokens:
        advantages = layout.spread(advantages).contiguous()
    numbers, bounds = _split(inputs.gate.params())
    kl_numbers, _ = _split(extra.kl.gate.params())
    return LinearPolicyLossInputs(  # type: ignore[call-arg]  # more after a *
        *head, wanted(head), main_grad, inputs.old_logp, advantages, layout.mask, layout.cu_seqlens, inputs.starts,
        weights.span_weight, weights.normalizer, inputs.token_weight, row.statistic, row.flow, inputs.gate.name,
        numbers, bounds, row.clamp, row.cap, extra.ref_logp, extra.kl.gate.name, kl_numbers, extra.kl.clamp,
        extra.kl.cap, extra.kl_coef, extra.kl_weight, extra.kl_ratio, extra.entropy_coef, extra.entropy_weight,
    )  # fmt: skip


def _two_ops(
    chosen: Backend, layout: Layout, head: HeadInputs, main_grad: Tensor | None, inputs: PolicyLossInputs
) -> tuple[Tensor, ...]:
    head = of_valid_tokens(layout, head)
    keep = to_keep(chosen, head, logp_alone=inputs.regularizers.entropy_coef == 0)
    logp, entropy, *_ = linear_token_logprobs(chosen, head, [], main_grad, keep)
    return of_statistics(chosen, layout, logp.squeeze(1), entropy, inputs, again=keep == "nothing")


def of_valid_tokens(layout: Layout, head: HeadInputs) -> HeadInputs:
    """With the ids of the others ignored."""
    return replace(head, ids=torch.where(layout.valid()[:, None], head.ids, IGNORED))


def of_statistics(
    chosen: Backend, layout: Layout, logp: Tensor, entropy: Tensor, inputs: PolicyLossInputs, *, again: bool
) -> tuple[Tensor, ...]:
    """linear_policy_loss of log-probs [N] and entropies [N], in differentiable torch around the ops. again: whether
    their backward computes the logits a second time."""
    loss, raw = policy_loss(chosen, layout, logp, entropy, inputs)
    passes = 2 if loss.requires_grad and not chosen.is_reference and again else 1
    return loss, torch.cat([raw, raw.new_full((1,), passes)]), logp.detach(), entropy.detach()
