"""Ops statistic and statistic_backward: tokenrl/objectives/statistics.py and the adjoints.

One program per sequence. Prefix statistics are one walk forwards, their adjoint one walk backwards; with segments a
span statistic walks forwards for the totals and backwards to hand them to every token of the segment.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .scalar import smaller
from .spans import (
    Spans,
    exclusive_minima,
    fill_outside,
    log_ratios,
    running_sum,
    segment_ends,
    segment_starts,
    sequence,
    spread,
    valid_tokens,
    without_padding,
)  # fmt: skip


@triton.jit
def prefix_block(spans, logp, old_logp, clamp, at, begin, end, x, t, reset, carry, STATISTIC: tl.constexpr):
    """Token and prefix statistics of a block with log ratios x and positions t; and the carry."""
    if STATISTIC == "token":
        return x, carry
    elif STATISTIC == "prefix_min":
        before, carry = exclusive_minima(spans, logp, old_logp, clamp, at, begin, end, reset, carry)
        return x + tl.where(before == float("inf"), 0.0, before), carry
    elif STATISTIC == "prefix_min_capped":
        before, carry = exclusive_minima(spans, logp, old_logp, clamp, at, begin, end, reset, carry)
        return x + smaller(before, 0.0), carry
    else:
        sums, carry = running_sum(spans, x, reset, carry, False)
        return sums / t if STATISTIC == "prefix_mean" else sums, carry


@triton.jit
def first_carry(STATISTIC: tl.constexpr, T: tl.constexpr):
    return tl.full((), float("inf") if STATISTIC == "prefix_min" or STATISTIC == "prefix_min_capped" else 0.0, T)


@triton.jit
def positions(spans, valid, reset, count, T: tl.constexpr):
    """The 1-based count of valid tokens (1 before the first), and the carry."""
    t, count = running_sum(spans, valid.to(tl.int32), reset, count, False)
    return tl.maximum(t, 1).to(T), count


@triton.jit
def span_total(spans, logp, old_logp, clamp, begin, end, BLOCK: tl.constexpr):
    """Sum of the log ratios of a whole sequence, and the count of its valid tokens, at least 1."""
    T: tl.constexpr = logp.dtype.element_ty
    sums, counts = tl.zeros((BLOCK,), T), tl.zeros((BLOCK,), tl.int32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        valid = valid_tokens(spans, at, at < end)
        _, x, _ = log_ratios(logp, old_logp, at, valid, clamp)
        sums += x
        counts += valid.to(tl.int32)
    return tl.sum(sums, 0), tl.maximum(tl.sum(counts, 0), 1).to(T)


@triton.jit
def segment_sums(spans, logp, old_logp, clamp, begin, end, sums_out, counts_out, BLOCK: tl.constexpr):
    """Stores the inclusive sums of log ratios and of valid tokens within each segment."""
    T: tl.constexpr = logp.dtype.element_ty
    carry, count = tl.zeros((), T), tl.zeros((), tl.int32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < end
        valid = valid_tokens(spans, at, inside)
        reset = segment_starts(spans, at, inside)
        _, x, _ = log_ratios(logp, old_logp, at, valid, clamp)
        sums, carry = running_sum(spans, x, reset, carry, False)
        counts, count = running_sum(spans, valid.to(tl.int32), reset, count, False)
        tl.store(sums_out + at, sums, mask=inside)
        tl.store(counts_out + at, counts, mask=inside)
    tl.debug_barrier()  # threads read back what others wrote


@triton.jit
def segment_totals(spans, at, begin, end, sums, counts, total, n):
    """Totals and counts of a block's segments, what segment_sums counted, and the carries, on a walk backwards."""
    inside = (at >= begin) & (at < end)
    ends = segment_ends(spans, at, end)
    count = tl.load(counts + at, mask=inside, other=0)
    totals, total = spread(tl.load(sums + at, mask=inside, other=0.0), ends, total, True)
    ns, n = spread(count, ends, n, True)
    return totals, tl.maximum(ns, 1), count, total, n


@triton.jit
def _prefix(spans, logp, old_logp, out, begin, end, STATISTIC: tl.constexpr, BLOCK: tl.constexpr):
    T: tl.constexpr = logp.dtype.element_ty
    carry, count, t = first_carry(STATISTIC, T), tl.zeros((), tl.int32), tl.full((BLOCK,), 1, T)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < end
        valid = valid_tokens(spans, at, inside)
        reset = segment_starts(spans, at, inside)
        _, x, _ = log_ratios(logp, old_logp, at, valid, None)
        if STATISTIC == "prefix_mean":
            t, count = positions(spans, valid, reset, count, T)
        s, carry = prefix_block(spans, logp, old_logp, None, at, begin, end, x, t, reset, carry, STATISTIC)
        tl.store(out + at, tl.where(valid, s, 0.0), mask=inside)


@triton.jit
def _span(spans, logp, old_logp, out, counts, begin, end, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    T: tl.constexpr = logp.dtype.element_ty
    if spans.starts is None:
        total, n = span_total(spans, logp, old_logp, None, begin, end, BLOCK)
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            valid = valid_tokens(spans, at, at < end)
            tl.store(out + at, tl.where(valid, total / n if MEAN else total, 0.0), mask=at < end)
    else:
        segment_sums(spans, logp, old_logp, None, begin, end, out, counts, BLOCK)
        total, n = tl.zeros((), T), tl.zeros((), tl.int32)
        for k in range(0, tl.cdiv(end - begin, BLOCK)):
            at = end - (k + 1) * BLOCK + tl.arange(0, BLOCK)
            totals, ns, _, total, n = segment_totals(spans, at, begin, end, out, counts, total, n)
            valid = valid_tokens(spans, at, (at >= begin) & (at < end))
            tl.store(out + at, tl.where(valid, totals / ns.to(T) if MEAN else totals, 0.0), mask=at >= begin)


@triton.jit
def _suffix(spans, grad, out, begin, end, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    T: tl.constexpr = grad.dtype.element_ty
    if MEAN:
        count = tl.zeros((), tl.int32)
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < end
            valid = valid_tokens(spans, at, inside)
            t, count = positions(spans, valid, segment_starts(spans, at, inside), count, T)
            tl.store(out + at, tl.load(grad + at, mask=valid, other=0.0) / t, mask=inside)
        tl.debug_barrier()  # threads read back what others wrote
    carry = tl.zeros((), T)
    for k in range(0, tl.cdiv(end - begin, BLOCK)):
        at = end - (k + 1) * BLOCK + tl.arange(0, BLOCK)
        inside = at >= begin
        valid = valid_tokens(spans, at, inside)
        g = tl.load((out if MEAN else grad) + at, mask=valid, other=0.0)
        sums, carry = running_sum(spans, g, segment_ends(spans, at, end), carry, True)
        tl.store(out + at, tl.where(valid, sums, 0.0), mask=inside)


@launch.kernel
def statistic_kernel(
    cu_seqlens, mask, starts, num_tokens, num_sequences, logp, old_logp, out, counts, STATISTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    spans = Spans(cu_seqlens, mask, starts, num_tokens, num_sequences)
    i = tl.program_id(0)
    begin, end = sequence(spans, i)
    fill_outside(spans, i, begin, end, out, BLOCK)
    begin, end = without_padding(spans, begin, end, out, BLOCK)
    if STATISTIC == "span_sum" or STATISTIC == "span_mean":
        _span(spans, logp, old_logp, out, counts, begin, end, STATISTIC == "span_mean", BLOCK)
    else:
        _prefix(spans, logp, old_logp, out, begin, end, STATISTIC, BLOCK)


@launch.kernel
def suffix_kernel(
    cu_seqlens, mask, starts, num_tokens, num_sequences, grad, out, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    spans = Spans(cu_seqlens, mask, starts, num_tokens, num_sequences)
    i = tl.program_id(0)
    begin, end = sequence(spans, i)
    fill_outside(spans, i, begin, end, out, BLOCK)
    begin, end = without_padding(spans, begin, end, out, BLOCK)
    _suffix(spans, grad, out, begin, end, MEAN, BLOCK)


def _launch_statistic(x: Tensor, old: Tensor | None, spans: Spans, statistic: str) -> Tensor:
    if spans.num_sequences == 0:
        return torch.zeros_like(x)
    out = torch.empty_like(x)
    segmented_span = spans.starts is not None and statistic.startswith("span")
    counts = torch.empty_like(x, dtype=torch.int32) if segmented_span else None
    block = launch.block_of(statistic, spans.num_tokens, spans.num_sequences)
    with launch.on_device_of(x):
        statistic_kernel[(spans.num_sequences,)](
            *spans, x, old, out, counts, STATISTIC=statistic, BLOCK=block, num_warps=launch.token_warps(block)
        )
    return out


def statistic(
    logp: Tensor, old_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor, starts: Tensor | None, statistic: str,
    flow: str,
) -> Tensor:  # fmt: skip
    """The statistic of logp - old_logp, [N], zero in masked cells. flow: of its derivative."""
    return _launch_statistic(
        logp, old_logp, Spans(cu_seqlens, mask, starts, logp.numel(), cu_seqlens.numel() - 1), statistic
    )


def statistic_backward(
    grad: Tensor, mask: Tensor | None, cu_seqlens: Tensor, starts: Tensor | None, statistic: str, flow: str
) -> Tensor:
    """The adjoint of the statistic applied to grad [N]; under flow "local" the gradient itself, zero in masked cells.

    Spans are their own adjoint: what a total hands to every token comes back from every token as a total.
    """
    spans = Spans(cu_seqlens, mask, starts, grad.numel(), cu_seqlens.numel() - 1)
    if flow == "local" or statistic.startswith("prefix_min"):
        return _launch_statistic(grad, None, spans, "token")
    if not statistic.startswith("prefix") or spans.num_sequences == 0:
        return _launch_statistic(grad, None, spans, statistic)
    out = torch.empty_like(grad)
    block = launch.block_of(statistic, spans.num_tokens, spans.num_sequences)
    with launch.on_device_of(grad):
        suffix_kernel[(spans.num_sequences,)](
            *spans, grad, out, MEAN=statistic == "prefix_mean", BLOCK=block, num_warps=launch.token_warps(block)
        )
    return out
