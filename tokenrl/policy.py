"""policy_loss: a row of the table of objectives, run on a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, reference, statistics
from .aggregate import SpanWeights, span_weights
from .errors import wrong
from .gate import Gate, map_params
from .layout import Layout, check_floats, check_integers, layout_of
from .metrics import Metrics
from .objectives import Objective
from .objectives import objective as find


def policy_loss(
    objective: str | Objective, logp: Tensor, old_logp: Tensor | None, advantages: Tensor | None, *,
    mask: Tensor | None = None, cu_seqlens: Tensor | None = None, segment_ids: Tensor | None = None,
    group_ids: Tensor | None = None, token_weight: Tensor | None = None, aggregation: str | None = None,
    normalizer: float | Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """The loss of a policy objective and its metrics: loss = sum_t w_t gate(s_t), s a statistic of the log ratios.

    objective: a name in tokenrl.OBJECTIVES, or what tokenrl.objective(name, ...) returns.
    logp, old_logp: fp32 or fp64 log-probs of the sampled tokens, [B, T], or packed [N] with cu_seqlens [S + 1]. Only
    logp gets a gradient. old_logp None means on-policy: logp without its gradient. For kl_* it is the reference
    model's log-prob.
    advantages: [B] (or [S]), or one per token; None for objectives that use none. In a packed batch with as many
    tokens as sequences they are read as one per token.
    mask: bool, of logp's shape: the tokens that enter the ratio and pay the loss. Masked cells may hold anything; a
    hole (tool output) inside a sequence adds nothing to a prefix and does not advance the position.
    segment_ids: integers of logp's shape; the statistic then runs over each run of equal ids inside a sequence instead
    of over the sequence.
    group_ids: integers [B] (or [S]), rollouts of one prompt share one; for "group-mean" and "balanced".
    token_weight: of logp's shape, multiplies the loss (importance weights, entropy masks), never the ratio.
    aggregation: a mode of tokenrl.aggregation_weights; None takes the objective's own. normalizer: the global count
    that the mode divides by (a number or a 0-d tensor), so that the parts of a split batch add up.
    backend: "cuda", "cpu", "triton", "reference"; None takes TOKENRL_BACKEND, else the first that can run.

    Returns (loss 0-d, Metrics). The forward saves one number per token, the backward is one multiplication;
    differentiating twice raises. Errors: ValueError naming the argument, what was given and what is accepted;
    RuntimeError with every backend's reason when none can run the call.
    """
    row, layout = find(objective), layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    check_floats("logp", logp)
    chosen = backends.choose(backend, logp.device)
    batch = checked_batch(
        row, layout, logp.dtype, chosen, old_logp, advantages, token_weight, segment_ids, group_ids, aggregation,
        normalizer,
    )  # fmt: skip
    logp = layout.tokens("logp", logp)
    loss, metrics = evaluate(chosen, layout, logp, logp.detach() if old_logp is None else batch.old_logp, batch)
    return loss, Metrics(metrics)


@dataclass(frozen=True)
class Batch:
    """An objective on a batch: checked, flat tensors. gate: that of the row, its tensors flat. old_logp None:
    on-policy."""

    row: Objective
    gate: Gate
    old_logp: Tensor | None
    advantages: Tensor | None
    token_weight: Tensor | None
    starts: Tensor | None
    weights: SpanWeights


def evaluate(chosen, layout: Layout, logp: Tensor, old_logp: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(loss, raw metrics) on a backend."""
    row, weights = batch.row, batch.weights
    if chosen.namespace is None:
        return reference.objective(
            logp, old_logp, batch.advantages, layout.valid(), layout.cu_seqlens, batch.starts, weights.span_weight,
            weights.normalizer, batch.token_weight, row.statistic, row.flow, batch.gate, row.clamp, row.cap,
            layout.width,
        )  # fmt: skip
    numbers, tensors = split_params(batch.gate.params())
    loss, _, metrics = chosen.differentiable("objective")(
        logp, old_logp, batch.advantages, layout.mask, layout.cu_seqlens, batch.starts, weights.span_weight,
        weights.normalizer, batch.token_weight, row.statistic, row.flow, batch.gate.name, numbers, tensors, row.clamp,
        row.cap,
    )  # fmt: skip
    return loss, metrics


def split_params(params) -> tuple[list[float], list[Tensor | None]]:
    """Gate parameters as the ops take them: a number each, or 0 and a tensor in its place."""
    tensors = [p.contiguous() if isinstance(p, Tensor) else None for p in params]
    return [0.0 if isinstance(p, Tensor) else float(p) for p in params], tensors


def checked_batch(
    row: Objective, layout: Layout, dtype: torch.dtype, chosen: backends.Backend, old_logp: Tensor | None,
    advantages: Tensor | None, token_weight: Tensor | None, segment_ids: Tensor | None, group_ids: Tensor | None,
    aggregation: str | None, normalizer: float | Tensor | None,
) -> Batch:  # fmt: skip
    if advantages is None and row.gate.uses_advantages:
        raise wrong("advantages", None, f"one per sequence or one per token; {row.name!r} needs them")
    for name, x in (("old_logp", old_logp), ("advantages", advantages), ("token_weight", token_weight)):
        if x is not None and x.requires_grad:
            raise wrong(name, "a tensor that requires grad", f"a constant ({name}.detach()); only logp gets a gradient")
    if old_logp is not None:
        check_floats("old_logp", old_logp)
        old_logp = layout.tokens("old_logp", old_logp, dtype)
    if advantages is not None:
        advantages = layout.tokens_or_sequences("advantages", advantages, dtype)
    if token_weight is not None:
        token_weight = layout.tokens("token_weight", token_weight, dtype)
    starts = None
    if segment_ids is not None:
        check_integers("segment_ids", segment_ids)
        starts = statistics.span_starts(layout.tokens("segment_ids", segment_ids), layout)
    gate = map_params(row.gate, lambda name, bound: layout.tokens(name, bound, dtype))
    weights = span_weights(
        aggregation or row.aggregation, layout, advantages=advantages, group_ids=group_ids, normalizer=normalizer,
        backend=chosen,
    )  # fmt: skip
    return Batch(row, gate, old_logp, advantages, token_weight, starts, weights)
