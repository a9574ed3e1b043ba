"""Op aggregation_weights: the span weights of tokenrl/objectives/aggregations.py and their normaliser.

Two kernels: counts and signs per sequence; then, where groups matter, each sequence against tiles of all sequences.
The last program of the kernel that counts the unit adds up what all of them left.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .spans import Spans, is_last, sequence, valid_tokens

TILE = 32  # sequences compared with TILE others at a time


@triton.jit
def sign_of(x):
    return (x > 0).to(tl.int32) - (x < 0).to(tl.int32)


@triton.jit
def finish(counts, n, ticket, normalizer, scale, POSITIVE: tl.constexpr, TILE: tl.constexpr):
    """The last program adds up n counts, or how many of them are positive, and scales the sum."""
    if is_last(ticket):
        sums = tl.zeros((TILE,), tl.int64)
        for first in range(0, n, TILE):
            i = first + tl.arange(0, TILE)
            # Not from L1: other multiprocessors wrote these.
            some = tl.load(counts + i, mask=i < n, other=0, cache_modifier=".cg")
            sums += (some > 0).to(tl.int64) if POSITIVE else some
        tl.store(normalizer, tl.sum(sums, 0).to(tl.float64) * tl.full((), scale, tl.float64))


@launch.kernel
def count_kernel(
    cu_seqlens, mask, starts, num_tokens, num_sequences, advantages, counts, signs, span_weight, ticket, normalizer,
    scale: tl.float64, PER_TOKEN: tl.constexpr, SPAN: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Valid tokens and sign of one sequence; its weight where that needs no group; the normaliser, but of groups."""
    spans = Spans(cu_seqlens, mask, starts, num_tokens, num_sequences)
    i = tl.program_id(0)
    begin, end = sequence(spans, i)
    numbers, sums = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.float64)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        valid = valid_tokens(spans, at, at < end)
        numbers += valid.to(tl.int64)
        if PER_TOKEN:
            sums += tl.load(advantages + at, mask=valid, other=0.0).to(tl.float64)
    n = tl.sum(numbers, 0)
    tl.store(counts + i, n)
    if PER_TOKEN:
        tl.store(signs + i, sign_of(tl.sum(sums, 0)))
    elif advantages is not None:
        tl.store(signs + i, sign_of(tl.load(advantages + i)))
    if SPAN == "one":
        tl.store(span_weight + i, (n > 0).to(tl.float64))
    elif SPAN == "inverse_length":
        tl.store(span_weight + i, tl.where(n > 0, 1.0 / tl.maximum(n, 1).to(tl.float64), 0.0))
    if UNIT == "one":
        if i == 0:
            tl.store(normalizer, tl.full((), scale, tl.float64))
    elif UNIT != "groups":
        finish(counts, spans.num_sequences, ticket, normalizer, scale, UNIT == "rows", TILE)


@triton.jit
def balanced_weight(rows, positives, negatives, tokens_positive, tokens_negative, sign):
    """size of the own sign's set / rows of the group / tokens of the own sign's set; 0 for sign 0."""
    size = tl.where(sign > 0, positives, negatives).to(tl.float64)
    tokens = tl.where(sign > 0, tokens_positive, tokens_negative).to(tl.float64)
    return tl.where(sign != 0, size / tl.maximum(rows, 1).to(tl.float64) / tl.maximum(tokens, 1.0), 0.0)


@launch.kernel
def group_kernel(
    counts, signs, group_ids, span_weight, leading, ticket, normalizer, num_sequences, scale: tl.float64,
    SPAN: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Weights of TILE sequences from the counts in their groups; a group is counted at its first sequence."""
    own = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = own < num_sequences
    group = tl.load(group_ids + own, mask=exists, other=0)
    n = tl.load(counts + own, mask=exists, other=0)
    none, zero = tl.zeros((TILE,), tl.int32), tl.zeros((TILE,), tl.int64)
    rows, positives, negatives, earlier = none, none, none, none
    tokens, tokens_positive, tokens_negative = zero, zero, zero
    for first in range(0, num_sequences, TILE):
        other = first + tl.arange(0, TILE)
        others = tl.load(counts + other, mask=other < num_sequences, other=0)
        ids = tl.load(group_ids + other, mask=other < num_sequences, other=0)
        same = (group[:, None] == ids[None, :]) & (others > 0)[None, :]
        if SPAN == "balanced":
            sign = tl.load(signs + other, mask=other < num_sequences, other=0)
            rows += tl.sum(same.to(tl.int32), 1)
            positive, negative = same & (sign > 0)[None, :], same & (sign < 0)[None, :]
            positives += tl.sum(positive.to(tl.int32), 1)
            negatives += tl.sum(negative.to(tl.int32), 1)
            tokens_positive += tl.sum(tl.where(positive, others[None, :], 0), 1)
            tokens_negative += tl.sum(tl.where(negative, others[None, :], 0), 1)
        elif SPAN == "group":
            tokens += tl.sum(tl.where(same, others[None, :], 0), 1)
        if UNIT == "groups":
            earlier += tl.sum((same & (other[None, :] < own[:, None])).to(tl.int32), 1)
    if SPAN == "balanced":
        sign = tl.load(signs + own, mask=exists, other=0)
        weight = balanced_weight(rows, positives, negatives, tokens_positive, tokens_negative, sign)
        tl.store(span_weight + own, tl.where(n > 0, weight, 0.0), mask=exists)
    elif SPAN == "group":
        weight = 1.0 / tl.maximum(tokens, 1).to(tl.float64)
        tl.store(span_weight + own, tl.where(n > 0, weight, 0.0), mask=exists)
    if UNIT == "groups":
        leads = exists & (n > 0) & (earlier == 0)
        tl.store(leading + tl.program_id(0), tl.sum(leads.to(tl.int64), 0))
        finish(leading, tl.num_programs(0), ticket, normalizer, scale, False, TILE)


def aggregation_weights(
    mask: Tensor | None, cu_seqlens: Tensor, num_tokens: int, advantages: Tensor | None, group_ids: Tensor | None,
    span: str, unit: str, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(span_weight float64 [S], normalizer float64 0-d)."""
    sequences = cu_seqlens.numel() - 1
    span_weight = cu_seqlens.new_empty(sequences, dtype=torch.float64)
    if sequences == 0:
        return span_weight, span_weight.new_full((), scale if unit == "one" else 0.0)
    normalizer = span_weight.new_empty(())
    counts = cu_seqlens.new_empty(sequences)
    signs = None if advantages is None else cu_seqlens.new_empty(sequences, dtype=torch.int32)
    per_token = advantages is not None and advantages.numel() == num_tokens
    block, tiles = launch.token_block(num_tokens, sequences), triton.cdiv(sequences, TILE)
    ticket = launch.ticket(cu_seqlens)
    with launch.on_device_of(cu_seqlens):
        count_kernel[(sequences,)](
            cu_seqlens, mask, None, num_tokens, sequences, advantages, counts, signs, span_weight, ticket,
            normalizer, scale, PER_TOKEN=per_token, SPAN=span, UNIT=unit, BLOCK=block, TILE=128,
            num_warps=launch.token_warps(block),
        )  # fmt: skip
        if span in ("group", "balanced") or unit == "groups":
            leading = counts.new_empty(tiles) if unit == "groups" else None
            group_kernel[(tiles,)](
                counts, signs, group_ids, span_weight, leading, ticket, normalizer, sequences, scale, SPAN=span,
                UNIT=unit, TILE=TILE, maxnreg=128,  # ptxas would rather spill
            )  # fmt: skip
    return span_weight, normalizer
