"""The walks of the objective kernel along one sequence: gates, coef = dloss/dlogp, sums for loss and metrics.

Token and prefix statistics: one walk forwards; under flow "through" it leaves g = w dl/ds behind, and a walk backwards
adds the suffix sums of g. Span statistics: totals first, then gates, then (through) the totals of g.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .scalar import larger, smaller, wide_exponential, wide_k3_of
from .spans import log_ratios, parameter, running_sum, segment_ends, segment_starts, spread, valid_tokens
from .statistic import first_carry, positions, prefix_block, segment_sums, segment_totals, span_total


class Tokens(NamedTuple):
    """Kernel argument: what each token brings, [N] (advantages also [S] or None; token_weight and params also None).

    vanishes: 1 where the gate's loss is 0 without an advantage, else None; known when a kernel is compiled."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor | None
    token_weight: Tensor | None
    params: tuple[Tensor | None, ...]
    vanishes: int | None


class Numbers(NamedTuple):
    """What is one number for all tokens, in their precision. params: the gate's, as far as Tokens has no tensor."""

    clamp: tl.tensor
    cap: tl.tensor
    params: tuple[tl.tensor, ...]


@triton.jit
def no_sums(BLOCK: tl.constexpr, T: tl.constexpr):
    """Per lane of a block: the metrics in the order of tokenrl/objectives/metrics.py, in place of the least and the
    largest ratio the statistics; then the loss. Ratios are summed in fp64, as fp32 ends at e^88 and could not square
    what is beyond e^44: a few such operations per token hide behind its loads."""
    none, zero, inf = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float64), tl.full((BLOCK,), float("inf"), T)
    narrow = tl.zeros((BLOCK,), T)
    return none, zero, inf, -inf, none, none, none, zero, zero, narrow, none, none, narrow


@triton.jit
def gated(
    tokens, numbers, weight, advantage, at, valid, logp, x, s, t, sums, GATE: tl.constexpr, NUM_PARAMS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """The gate on a block: w dl/ds, w dl/dlogp, and the sums with this block added."""
    T: tl.constexpr = tokens.logp.dtype.element_ty
    if PER_TOKEN:
        advantage = tl.load(tokens.advantages + at, mask=valid, other=0.0)
    if tokens.token_weight is not None:
        weight = weight * tl.load(tokens.token_weight + at, mask=valid, other=0.0)
    # The interpreter cannot combine a number's comparison with a block's: make both blocks.
    advantage, weight = advantage + tl.zeros_like(x), weight + tl.zeros_like(x)
    one, per_token = numbers.params, tokens.params
    params = (
        parameter(one[0], per_token[0], at, valid, T), parameter(one[1], per_token[1], at, valid, T),
        parameter(one[2], per_token[2], at, valid, T), parameter(one[3], per_token[3], at, valid, T),
        parameter(one[4], per_token[4], at, valid, T), parameter(one[5], per_token[5], at, valid, T),
    )  # fmt: skip
    capped = smaller(s, numbers.cap)
    value, d_s, d_logp, low, high, dual = GATE(capped, x, logp, advantage, t, *params[:NUM_PARAMS])
    live = valid & (weight != 0)  # elsewhere nothing may enter, not even inf
    if tokens.vanishes is not None:
        live = live & (advantage != 0)
    g = tl.where(live & (s <= numbers.cap), weight * d_s, 0.0)
    e = tl.where(live, weight * d_logp, 0.0)
    ratio = tl.where(valid, wide_exponential(capped), 0.0)
    low, high, positive = valid & low, valid & high, advantage > 0
    count, ratios, least, most, lows, highs, duals, kl, squares, xs, lows_pos, highs_pos, loss = sums
    sums = (
        count + valid.to(tl.int32), ratios + ratio, smaller(least, tl.where(valid, capped, float("inf"))),
        larger(most, tl.where(valid, capped, -float("inf"))), lows + low.to(tl.int32), highs + high.to(tl.int32),
        duals + (valid & dual).to(tl.int32), kl + wide_k3_of(x), squares + ratio * ratio, xs + x,
        lows_pos + (low & positive).to(tl.int32), highs_pos + (high & positive).to(tl.int32),
        loss + tl.where(live, weight * value, 0.0),
    )  # fmt: skip
    return g, e, sums


@triton.jit
def prefix_walk(
    spans, tokens, numbers, weight, advantage, begin, end, coef, scratch, STATISTIC: tl.constexpr, FLOW: tl.constexpr,
    GATE: tl.constexpr, NUM_PARAMS: tl.constexpr, PER_TOKEN: tl.constexpr, POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gates of token and prefix statistics. coef is final except for a prefix under flow "through": there it holds
    w dl/dlogp, and scratch what suffix_walk adds up."""
    T: tl.constexpr = coef.dtype.element_ty
    sums, t = no_sums(BLOCK, T), tl.full((BLOCK,), 1, T)
    carry, count = first_carry(STATISTIC, T), tl.zeros((), tl.int32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < end
        valid = valid_tokens(spans, at, inside)
        reset = segment_starts(spans, at, inside)
        logp, x, passes = log_ratios(tokens.logp, tokens.old_logp, at, valid, numbers.clamp)
        if POSITION or STATISTIC == "prefix_mean":
            t, count = positions(spans, valid, reset, count, T)
        s, carry = prefix_block(
            spans, tokens.logp, tokens.old_logp, numbers.clamp, at, begin, end, x, t, reset, carry, STATISTIC
        )
        g, e, sums = gated(
            tokens, numbers, weight, advantage, at, valid, logp, x, s, t, sums, GATE, NUM_PARAMS, PER_TOKEN
        )
        if FLOW == "local":
            tl.store(coef + at, g + e, mask=inside)
        elif STATISTIC == "token":
            tl.store(coef + at, tl.where(passes, g, 0.0) + e, mask=inside)
        else:
            tl.store(coef + at, e, mask=inside)
            tl.store(scratch + at, g / t if STATISTIC == "prefix_mean" else g, mask=inside)
    return sums


@triton.jit
def suffix_walk(spans, tokens, clamp, begin, end, coef, scratch, BLOCK: tl.constexpr):
    """Adds the suffix sums of scratch to coef."""
    tl.debug_barrier()  # threads read back what others wrote
    carry = tl.zeros((), coef.dtype.element_ty)
    for k in range(0, tl.cdiv(end - begin, BLOCK)):
        at = end - (k + 1) * BLOCK + tl.arange(0, BLOCK)
        inside = at >= begin
        valid = valid_tokens(spans, at, inside)
        _, _, passes = log_ratios(tokens.logp, tokens.old_logp, at, valid, clamp)
        g = tl.load(scratch + at, mask=inside, other=0.0)
        g, carry = running_sum(spans, g, segment_ends(spans, at, end), carry, True)
        e = tl.load(coef + at, mask=inside, other=0.0)
        tl.store(coef + at, e + tl.where(valid & passes, g, 0.0), mask=inside)


@triton.jit
def span_walk(
    spans, tokens, numbers, weight, advantage, begin, end, coef, STATISTIC: tl.constexpr, FLOW: tl.constexpr,
    GATE: tl.constexpr, NUM_PARAMS: tl.constexpr, PER_TOKEN: tl.constexpr, POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gates where the span is the sequence: its total first, then every token's gate, then (through) the total of g."""
    T: tl.constexpr = coef.dtype.element_ty
    total, n = span_total(spans, tokens.logp, tokens.old_logp, numbers.clamp, begin, end, BLOCK)
    scale = 1 / n if STATISTIC == "span_mean" else tl.full((), 1, T)
    s = total / n if STATISTIC == "span_mean" else total
    sums, t, gs = no_sums(BLOCK, T), tl.full((BLOCK,), 1, T), tl.zeros((BLOCK,), T)
    count = tl.zeros((), tl.int32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        valid = valid_tokens(spans, at, at < end)
        logp, x, _ = log_ratios(tokens.logp, tokens.old_logp, at, valid, numbers.clamp)
        if POSITION:
            t, count = positions(spans, valid, valid, count, T)
        g, e, sums = gated(
            tokens, numbers, weight, advantage, at, valid, logp, x, s + tl.zeros_like(x), t, sums, GATE, NUM_PARAMS,
            PER_TOKEN,
        )  # fmt: skip
        gs += g
        tl.store(coef + at, g + e if FLOW == "local" else e, mask=at < end)
    if FLOW == "through":
        g = tl.sum(gs, 0) * scale
        tl.debug_barrier()  # threads read back what others wrote
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            valid = valid_tokens(spans, at, at < end)
            _, _, passes = log_ratios(tokens.logp, tokens.old_logp, at, valid, numbers.clamp)
            e = tl.load(coef + at, mask=valid, other=0.0)
            tl.store(coef + at, e + tl.where(valid & passes, g, 0.0), mask=at < end)
    return sums


@triton.jit
def segment_walk(
    spans, tokens, numbers, weight, advantage, begin, end, coef, scratch, counts, STATISTIC: tl.constexpr,
    FLOW: tl.constexpr, GATE: tl.constexpr, NUM_PARAMS: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gates where spans are segments: sums forwards; totals and gates backwards; scratch gets the suffix sums of g."""
    T: tl.constexpr = coef.dtype.element_ty
    segment_sums(spans, tokens.logp, tokens.old_logp, numbers.clamp, begin, end, scratch, counts, BLOCK)
    sums, total, n = no_sums(BLOCK, T), tl.zeros((), T), tl.zeros((), tl.int32)
    carry = tl.zeros((), T)
    for k in range(0, tl.cdiv(end - begin, BLOCK)):
        at = end - (k + 1) * BLOCK + tl.arange(0, BLOCK)
        inside = at >= begin
        valid = valid_tokens(spans, at, inside)
        logp, x, _ = log_ratios(tokens.logp, tokens.old_logp, at, valid, numbers.clamp)
        s, ns, t, total, n = segment_totals(spans, at, begin, end, scratch, counts, total, n)
        if STATISTIC == "span_mean":
            s = s / ns.to(T)
        t = tl.maximum(t, 1).to(T)
        g, e, sums = gated(
            tokens, numbers, weight, advantage, at, valid, logp, x, s, t, sums, GATE, NUM_PARAMS, PER_TOKEN
        )
        if FLOW == "through":
            g = g / ns.to(T) if STATISTIC == "span_mean" else g
            g, carry = running_sum(spans, g, segment_ends(spans, at, end), carry, True)
            tl.store(scratch + at, g, mask=inside)
        tl.store(coef + at, e if FLOW == "through" else g + e, mask=inside)
    if FLOW == "through":
        add_segment_totals(spans, tokens, numbers.clamp, begin, end, coef, scratch, BLOCK)
    return sums


@triton.jit
def add_segment_totals(spans, tokens, clamp, begin, end, coef, scratch, BLOCK: tl.constexpr):
    """Adds to coef what scratch, suffix sums, holds at the first token of each segment."""
    tl.debug_barrier()  # threads read back what others wrote
    total = tl.zeros((), coef.dtype.element_ty)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < end
        valid = valid_tokens(spans, at, inside)
        _, _, passes = log_ratios(tokens.logp, tokens.old_logp, at, valid, clamp)
        starts = segment_starts(spans, at, inside) | (at == begin)
        g, total = spread(tl.load(scratch + at, mask=inside, other=0.0), starts, total, False)
        e = tl.load(coef + at, mask=inside, other=0.0)
        tl.store(coef + at, e + tl.where(valid & passes, g, 0.0), mask=inside)
