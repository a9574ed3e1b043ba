"""Masks, lengths, groups and signs -> the weights of a mode (tokenrl/objectives/aggregations.py), on a backend."""

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_integers, check_name, check_number, check_tensor, values_known
from ..batch.layout import Layout, layout_of
from ..errors import wrong
from ..objectives.aggregations import AGGREGATIONS, Aggregation
from ..ops import backends, dispatch
from ..ops.dispatch import SpanWeights

POSITIVE = "a positive number (the global count that the mode divides by), or 0 where no token is valid"


def span_weights(
    aggregation: str, layout: Layout, *, advantages: Tensor | None, group_ids: Tensor | None,
    normalizer: float | Tensor | None, backend: backends.Backend,
) -> SpanWeights:  # fmt: skip
    """The two factors of a mode's weights. advantages: flat [S] or [N] (a sequence's sign is that of their sum)."""
    mode = _checked_mode(aggregation, layout, advantages, group_ids, normalizer)
    groups = None
    if mode.by_group and group_ids is not None:
        check_integers("group_ids", group_ids)
        groups = layout.flat_sequences("group_ids", group_ids, torch.int64)
    signs = advantages if mode.span == "balanced" else None
    unit, scale = mode.unit, float(layout.width or 0) if mode.over_width else 1.0
    if normalizer is not None:
        _check_normalizer(normalizer)
        unit, scale = "one", 1.0 if isinstance(normalizer, Tensor) else float(normalizer)
    # A number in an op is there once and for all: a trace multiplies by what may change from call to call.
    outside = torch.compiler.is_compiling()
    weights = dispatch.aggregation_weights(backend, layout, signs, groups, mode.span, unit, 1.0 if outside else scale)
    if outside:
        weights = SpanWeights(weights.span_weight, weights.normalizer * scale)
    if not isinstance(normalizer, Tensor):
        if normalizer == 0 and values_known(weights.span_weight) and weights.span_weight.any():
            raise wrong("normalizer", normalizer, POSITIVE)
        return weights
    return SpanWeights(weights.span_weight, _as_divisor(normalizer, weights.span_weight))


def _checked_mode(
    aggregation: str, layout: Layout, advantages: Tensor | None, group_ids: Tensor | None,
    normalizer: float | Tensor | None,
) -> Aggregation:  # fmt: skip
    """The mode, where the batch has what it needs."""
    check_name("aggregation", aggregation, AGGREGATIONS)
    mode = AGGREGATIONS[aggregation]
    if mode.by_group and group_ids is None:
        accepted = f"one integer per sequence, [{layout.num_sequences}]; aggregation {aggregation!r} needs it"
        raise wrong("group_ids", None, accepted)
    if mode.span == "balanced" and advantages is None:
        raise wrong("advantages", None, "one per sequence or token; aggregation 'balanced' needs their signs")
    if mode.over_width and normalizer is None and layout.width is None:
        accepted = "sequences x horizon: a packed batch has no width for 'seq-mean-token-sum-norm'"
        raise wrong("normalizer", None, accepted)
    return mode


def _as_divisor(given: Tensor, span_weight: Tensor) -> Tensor:
    """float64, 0-d, on the device of the weights. Where a check were a sync a count below zero becomes NaN, so that no
    loss has the wrong sign; NaN and 0 show in the loss as they are."""
    count = given.to(span_weight.device, torch.float64).reshape(())
    if not values_known(count):
        return torch.where(count < 0, torch.nan, count)
    if count > 0 or (count == 0 and not span_weight.any()):
        return count
    raise wrong("normalizer", f"{count.item()} in the tensor", POSITIVE)


def _check_normalizer(given: float | Tensor) -> None:
    if not isinstance(given, Tensor):
        check_number("normalizer", given, 0, accepted=POSITIVE)
        return
    check_constant("normalizer", given)
    if given.numel() != 1:
        raise wrong("normalizer", f"a tensor of shape {list(given.shape)}", "a number or a 0-d tensor")


def aggregation_weights(
    aggregation: str,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages: Tensor | None = None,
    advantages_per: str | None = None,
    group_ids: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The weight of each token, w, so that a loss is sum_t w_t l_t.

        "token-mean"                 1 / N
        "token-sum"                  1
        "seq-mean-token-mean"        1 / (R n_i)
        "seq-mean-token-sum"         1 / R
        "seq-mean-token-sum-norm"    1 / (R T)
        "group-mean"                 1 / (G N_g)
        "balanced"                   |S| / R_g / tokens(S) / G

    N, N_g valid tokens, R, R_g sequences and G groups with any. Balanced Aggregation: S the sequences of the group with
    the sign of this one's advantage, R_g all of the group; those with advantage 0 weigh nothing and count in R_g, which
    is our reading.

    Args:
        aggregation: one of these names.
        mask: bool [B, T], or [N] beside cu_seqlens.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages: [B] (or [S]) or one per token, for "balanced".
        advantages_per: as for policy_loss.
        group_ids: integers [B] (or [S]).
        normalizer: what to divide by instead of the batch's own count (N, R, R T or G); 0 where no token is valid, in
            any part.
        backend: as for policy_loss.

    Returns:
        fp32 of the mask's shape, zero in masked cells.

    Source: Balanced Aggregation, arXiv 2605.04077 (notes).
    """
    if mask is not None:
        tokens = mask
    elif cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens)
        tokens = _packed_like(cu_seqlens)
    else:
        raise wrong("mask", None, "a bool [B, T], or cu_seqlens [S + 1] of a packed batch")
    layout = layout_of(tokens, mask=mask, cu_seqlens=cu_seqlens, name="mask")
    if advantages is not None:
        check_constant("advantages", advantages)
        advantages = layout.flat_tokens_or_sequences("advantages", advantages, torch.float32, advantages_per)
    chosen = backends.choose(backend, tokens.device)
    weights = span_weights(
        aggregation, layout, advantages=advantages, group_ids=group_ids, normalizer=normalizer, backend=chosen
    )
    share = weights.span_weight
    per_sequence = torch.where(share == 0, 0.0, share / weights.normalizer).float()
    return torch.where(layout.valid(), layout.spread(per_sequence), 0).view(layout.shape)


def _packed_like(cu_seqlens: Tensor) -> Tensor:
    # Boundaries of a wrong shape or order get an error that names them from layout_of, not one from here.
    total = int(cu_seqlens[-1]) if cu_seqlens.dim() == 1 and cu_seqlens.numel() else 0
    return torch.empty(max(total, 0), dtype=torch.bool, device=cu_seqlens.device)
