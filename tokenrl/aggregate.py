"""Masks, lengths, groups and signs -> the weight w of each token in the loss: L = sum_t w_t l_t.

A mode is a row of a table: w_t = span_weight / normaliser for the valid tokens of a sequence with n > 0 of them.

    span             span_weight                                              unit     normaliser counts
    one              1                                                        tokens   valid tokens
    inverse_length   1 / n                                                    rows     sequences with a valid token
    group            1 / tokens of the group                                  groups   groups with a valid token
    balanced         |own sign| / (|P| + |N|) / tokens of the own sign
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends
from .errors import unknown, wrong
from .layout import Layout, check_constant, check_integers, layout_of


@dataclass(frozen=True)
class Aggregation:
    """A mode: its span weight, what its normaliser counts (None: the normaliser is 1), and whether it is also divided
    by the padded width T."""

    span: str
    unit: str | None
    over_width: bool = False

    @property
    def by_group(self) -> bool:
        return self.span in ("group", "balanced")


AGGREGATIONS = {
    "token-mean": Aggregation("one", "tokens"),
    "token-sum": Aggregation("one", None),
    "seq-mean-token-mean": Aggregation("inverse_length", "rows"),
    "seq-mean-token-sum": Aggregation("one", "rows"),
    "seq-mean-token-sum-norm": Aggregation("one", "rows", over_width=True),
    "group-mean": Aggregation("group", "groups"),
    "balanced": Aggregation("balanced", "groups"),
}


@dataclass(frozen=True)
class SpanWeights:
    """span_weight: float64 [S]. normalizer: float64, 0-d; the weight of a sequence's tokens is their quotient."""

    span_weight: Tensor
    normalizer: Tensor


def span_weights(
    aggregation: str, layout: Layout, *, advantages: Tensor | None, group_ids: Tensor | None,
    normalizer: float | Tensor | None, backend: backends.Backend,
) -> SpanWeights:  # fmt: skip
    """The two factors of a mode's weights. advantages: flat [S] or [N] (a sequence's sign is that of their sum)."""
    if aggregation not in AGGREGATIONS:
        raise unknown("aggregation", aggregation, AGGREGATIONS)
    mode = AGGREGATIONS[aggregation]
    if mode.by_group and group_ids is None:
        raise wrong(
            "group_ids",
            None,
            f"one integer per sequence, [{layout.num_sequences}]; aggregation {aggregation!r} needs it",
        )
    if mode.span == "balanced" and advantages is None:
        raise wrong("advantages", None, "one per sequence or token; aggregation 'balanced' needs their signs")
    if mode.over_width and normalizer is None and layout.width is None:
        raise wrong(
            "normalizer", None, "sequences x horizon: a packed batch has no width for 'seq-mean-token-sum-norm'"
        )
    if mode.by_group:
        check_integers("group_ids", group_ids)
    groups = layout.sequences("group_ids", group_ids, torch.int64) if mode.by_group else None
    signs = advantages if mode.span == "balanced" else None
    weight, count = backend.aggregation_weights(
        layout.mask, layout.cu_seqlens, layout.num_tokens, signs, groups, mode.span, mode.unit or "tokens"
    )
    return SpanWeights(weight, _normalizer(normalizer, mode, count, layout))


def _normalizer(given: float | Tensor | None, mode: Aggregation, count: Tensor, layout: Layout) -> Tensor:
    if isinstance(given, Tensor):
        check_constant("normalizer", given)
        if given.numel() != 1:
            raise wrong("normalizer", f"a tensor of shape {list(given.shape)}", "a number or a 0-d tensor")
        return given.to(count.device, torch.float64).reshape(())
    if given is not None:
        if not given > 0:
            raise wrong("normalizer", given, "a positive number (the global count that the mode divides by)")
        return torch.full((), given, dtype=torch.float64, device=count.device)
    if mode.unit is None:
        return torch.ones((), dtype=torch.float64, device=count.device)
    return count.to(torch.float64) * (layout.width if mode.over_width else 1)


def aggregation_weights(
    aggregation: str, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, advantages: Tensor | None = None,
    group_ids: Tensor | None = None, normalizer: float | Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The weight of each token, w, so that a loss is sum_t w_t l_t.

    aggregation: "token-mean" 1 / N, "token-sum" 1, "seq-mean-token-mean" 1 / (R n_i), "seq-mean-token-sum" 1 / R,
    "seq-mean-token-sum-norm" 1 / (R T), "group-mean" 1 / (G N_g), "balanced" |S| / (|P| + |N|) / tokens(S) / G
    (Balanced Aggregation, arXiv 2605.04077 [N]: S the sequences of the group with the sign of this one's advantage;
    sequences with advantage 0 weigh nothing and leave the counts, their group still counts in G [R]). N valid tokens,
    R sequences and G groups with any.
    mask: bool [B, T], or [N] beside cu_seqlens [S + 1]. advantages: [B] (or [S]) or one per token, for "balanced".
    group_ids: integers [B] (or [S]). normalizer: what to divide by instead of the batch's own count (N, R, R T or G).
    Returns fp32 of the mask's shape, zero in masked cells.
    """
    if mask is None and cu_seqlens is None:
        raise wrong("mask", None, "a bool [B, T], or cu_seqlens [S + 1] of a packed batch")
    tokens = mask if mask is not None else _packed_like(cu_seqlens)
    layout = layout_of(tokens, mask=mask, cu_seqlens=cu_seqlens, name="mask")
    if advantages is not None:
        check_constant("advantages", advantages)
        advantages = layout.tokens_or_sequences("advantages", advantages, torch.float32)
    chosen = backends.choose(backend, tokens.device)
    weights = span_weights(
        aggregation, layout, advantages=advantages, group_ids=group_ids, normalizer=normalizer, backend=chosen
    )
    per_sequence = torch.where(weights.normalizer > 0, weights.span_weight / weights.normalizer, 0.0).float()
    lengths = layout.cu_seqlens.diff()
    per_token = per_sequence.repeat_interleave(lengths, output_size=layout.num_tokens)
    return torch.where(layout.valid(), per_token, 0.0).view(layout.shape)


def _packed_like(cu_seqlens: Tensor) -> Tensor:
    # Boundaries of a wrong shape or order get an error that names them from layout_of, not one from here.
    total = int(cu_seqlens[-1]) if cu_seqlens.dim() == 1 and cu_seqlens.numel() else 0
    return torch.empty(max(total, 0), dtype=torch.bool, device=cu_seqlens.device)
