"""The checks of a policy loss's arguments, once for both fronts: what a caller gave -> PolicyLossInputs."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..batch.checks import check_floats, check_integers, check_tensor
from ..batch.layout import Layout
from ..batch.spans import span_starts
from ..errors import described, unknown, wrong
from ..logprobs.vocabulary import Vocabulary, refuse_beside_vocab
from ..objectives.gates.base import map_params
from ..objectives.policy import Objective
from ..ops.backends import Backend
from ..ops.dispatch import PolicyLossInputs, Regularizers, SpanWeights
from .aggregation import span_weights
from .regularizers import flat_weight
from .rollout_correction import importance_weights

CORRECTION = ("level", "segment_ids", "bound", "low", "high", "clamp", "normalize", "unknown")  # of importance_weights
TRUNCATED = {"level": "token", "bound": "truncate", "high": 2.0}  # verl's default


@runtime_checkable
class BatchOnRanks(Protocol):
    """A batch whose tokens lie on several ranks: tokenrl.distributed.ContextShard."""

    def of_batch(
        self, logp: Tensor, beside: Tensor | None, check: bool, name: str = "entropy"
    ) -> tuple[Tensor, Tensor | None]: ...
    def take(self, x: Tensor) -> Tensor: ...
    def gathered(self, x: Tensor, *, check: bool = True) -> Tensor: ...
    def hidden_of_batch(self, hidden: Tensor) -> Tensor: ...
    def agreement(self, what: str, like: Tensor, check: bool) -> AbstractContextManager[Any]: ...
    def agree(self, agreed: Any, *loss: Any) -> None: ...
    def agree_on_preference(self, agreed: Any, *loss: Any) -> None: ...
    def linear_policy_loss(self, vocab: Any, reduce_hidden_grad: bool, *loss: Any) -> tuple[Tensor, ...]: ...


def as_batch_on_ranks(context: object) -> BatchOnRanks:
    if not isinstance(context, BatchOnRanks):
        raise wrong("context", described(context), "a tokenrl.distributed.ContextShard")
    return context


def ranks_of(vocab: object, context: object) -> list[Any]:
    """What of a call lies on ranks."""
    found: list[Any] = []
    if vocab is not None:
        refuse_beside_vocab(vocab)
        found.append(vocab)
    return found if context is None else [*found, as_batch_on_ranks(context)]


def check_beside_context(vocab: Vocabulary | None, context: BatchOnRanks | None) -> None:
    if vocab is not None and context is not None and vocab.sequence_parallel:
        accepted = "a VocabShard without it: hidden is of the context's own tokens, the same on all ranks of vocab"
        raise wrong("vocab", "one of sequence_parallel hidden states beside context", accepted)


def policy_loss_inputs(
    row: Objective,
    layout: Layout,
    dtype: torch.dtype,
    chosen: Backend,
    *,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    advantages_per: str | None,
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
    per_row = None
    if advantages is not None:
        advantages, per_row = _advantages(layout, advantages, dtype, advantages_per)
    if token_weight is not None:
        token_weight = flat_weight("token_weight", token_weight, layout, dtype)
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
    gate = gate.weighed(lambda: _of_tokens(weights, layout, dtype))
    return PolicyLossInputs(
        row, gate, form, old_logp, advantages, per_row, token_weight, starts, group_ids, aggregation, weights,
        regularizers,
    )  # fmt: skip


def _advantages(layout: Layout, given: Tensor, dtype: torch.dtype, per: str | None) -> tuple[Tensor, Tensor | None]:
    """([S] or [N], [S] if they are one per sequence)."""
    flat = layout.flat_tokens_or_sequences("advantages", given, dtype, per)
    if per == "token" or given.shape != (layout.num_sequences,):
        return flat, None
    return flat, flat if flat.numel() != layout.num_tokens else layout.flat_sequences("advantages", given, dtype)


def _of_tokens(weights: SpanWeights, layout: Layout, dtype: torch.dtype) -> Tensor:
    """[N]"""
    share = weights.span_weight
    return layout.spread(torch.where(share == 0, 0, share / weights.normalizer)).to(dtype)


def _checked_correction(correction: object) -> Mapping[str, Any]:
    if not isinstance(correction, Mapping):
        raise wrong("correction", described(correction), "a dict, as {'bound': 'truncate', 'high': 2.0}")
    for key in correction:
        if key not in CORRECTION:
            raise unknown("correction", key, CORRECTION)
    return correction


def _check_in_ratio(row: Objective, level: Any, kl_ratio: str | None) -> None:
    if level != "token":
        raise wrong("correction", f"level {level!r}", "'token': the objective multiplies them over the row")
    if kl_ratio is not None:
        given = f"{kl_ratio!r} and rollout_logp, which {row.name!r} takes into its ratio"
        raise wrong("kl_ratio", given, "one of the two: the ratio of a KL holds no rollout")


def corrected(
    row: Objective,
    layout: Layout,
    old_logp: Tensor | None,
    current: Tensor | None,
    rollout_logp: Tensor | None,
    segment_ids: Tensor | None,
    token_weight: Tensor | None,
    correction: Mapping[str, Any] | None,
    kl_ratio: str | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(old_logp, token_weight), one of them with the importance weights of old_logp (on-policy: current) to the
    rollout's as a factor, if that is given: of the ratio to old_logp, or of token_weight."""
    if rollout_logp is None:
        if correction is not None:
            raise wrong("rollout_logp", None, "log-probs of the sampling engine; correction is given")
        return old_logp, token_weight
    in_ratio, logp = row.gate.reads_rollout, current if old_logp is None else old_logp
    if logp is None:
        raise wrong("old_logp", None, "log-probs to compare rollout_logp with; on-policy they are not known in advance")
    check_tensor("old_logp", logp)
    given = TRUNCATED if correction is None else _checked_correction(correction)
    if in_ratio:
        _check_in_ratio(row, given.get("level", "token"), kl_ratio)
    if given.get("level") == "segment":
        given = {"segment_ids": segment_ids, **given}
    if logp.shape != layout.shape:
        raise wrong("old_logp", f"shape {list(logp.shape)}", f"one value per token, {list(layout.shape)}")
    where: dict[str, Any] = {"mask": None if layout.mask is None else layout.mask.view(layout.shape)}
    if layout.width is None:
        where["cu_seqlens"] = layout.cu_seqlens
    weights = importance_weights(logp.detach(), rollout_logp, **where, **given)
    if in_ratio:
        return logp.detach() - weights.clamp(min=1e-8).log(), token_weight
    if token_weight is None:
        return old_logp, weights
    check_tensor("token_weight", token_weight)
    return old_logp, torch.where(weights != 0, weights * token_weight, 0)
