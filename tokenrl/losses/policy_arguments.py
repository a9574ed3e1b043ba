"""The checks of a policy loss's arguments, once for both fronts: what a caller gave -> PolicyLossInputs."""

import torch
from torch import Tensor

from ..batch.checks import check_floats, check_integers, check_tensor
from ..batch.layout import Layout
from ..batch.spans import span_starts
from ..errors import wrong
from ..objectives.gates.base import map_params
from ..objectives.policy import Objective
from ..ops.backends import Backend
from ..ops.dispatch import PolicyLossInputs, Regularizers
from .aggregation import span_weights


def policy_loss_inputs(
    row: Objective,
    layout: Layout,
    dtype: torch.dtype,
    chosen: Backend,
    *,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    token_weight: Tensor | None,
    segment_ids: Tensor | None,
    group_ids: Tensor | None,
    aggregation: str | None,
    normalizer: float | Tensor | None,
    regularizers: Regularizers,
) -> PolicyLossInputs:
    """Checked and flat, in the precision of the loss."""
    if advantages is None and row.gate.uses_advantages:
        raise wrong("advantages", None, f"one per sequence or one per token; {row.name!r} needs them")
    for name, x in (("old_logp", old_logp), ("advantages", advantages), ("token_weight", token_weight)):
        if x is not None:
            check_tensor(name, x)
        if x is not None and x.requires_grad:
            raise wrong(name, "a tensor that requires grad", f"a constant ({name}.detach()); only logp gets a gradient")
    if old_logp is not None:
        check_floats("old_logp", old_logp)
        old_logp = layout.flat_tokens("old_logp", old_logp, dtype)
    if advantages is not None:
        advantages = layout.flat_tokens_or_sequences("advantages", advantages, dtype)
    if token_weight is not None:
        token_weight = layout.flat_tokens("token_weight", token_weight, dtype)
    starts = None
    if segment_ids is not None:
        check_integers("segment_ids", segment_ids)
        starts = span_starts(layout.flat_tokens("segment_ids", segment_ids), layout)

    def flat(name: str, bound: Tensor) -> Tensor:
        return layout.flat_tokens(name, bound, dtype)

    gate, form = map_params(row.gate, flat), None if row.form is None else map_params(row.form, flat)
    aggregation = aggregation or row.aggregation
    weights = span_weights(
        aggregation, layout, advantages=advantages, group_ids=group_ids, normalizer=normalizer, backend=chosen
    )
    return PolicyLossInputs(
        row, gate, form, old_logp, advantages, token_weight, starts, group_ids, aggregation, weights, regularizers
    )
