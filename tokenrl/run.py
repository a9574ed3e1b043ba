"""An objective on a batch: the checks of a call's arguments, and the row run on a backend."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, reference, statistics
from .aggregate import SpanWeights, span_weights
from .errors import wrong
from .form import Form, Tokens
from .gate import Gate, map_params
from .layout import Layout, check_floats, check_integers
from .objectives import Objective


@dataclass(frozen=True)
class Batch:
    """An objective on a batch: checked, flat tensors. gate, form: those of the row, their tensors flat. old_logp None:
    on-policy."""

    row: Objective
    gate: Gate
    form: Form | None
    old_logp: Tensor | None
    advantages: Tensor | None
    token_weight: Tensor | None
    starts: Tensor | None
    group_ids: Tensor | None
    aggregation: str
    weights: SpanWeights


def evaluate(
    chosen: backends.Backend, layout: Layout, logp: Tensor, old_logp: Tensor, batch: Batch
) -> tuple[Tensor, Tensor]:
    """(loss, raw metrics) on a backend."""
    if batch.form is not None:
        return batch.form.evaluate(Tokens(_evaluate_row, chosen, layout, batch, logp, old_logp))
    return _evaluate_row(chosen, layout, logp, old_logp, batch)


def _evaluate_row(chosen, layout: Layout, logp: Tensor, old_logp: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
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
    gate, form = (
        None if part is None else map_params(part, lambda name, bound: layout.tokens(name, bound, dtype))
        for part in (row.gate, row.form)
    )
    aggregation = aggregation or row.aggregation
    weights = span_weights(
        aggregation, layout, advantages=advantages, group_ids=group_ids, normalizer=normalizer, backend=chosen
    )
    return Batch(row, gate, form, old_logp, advantages, token_weight, starts, group_ids, aggregation, weights)
