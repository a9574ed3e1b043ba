"""Ops divergence and divergence_backward: two heads' rows of logits side by side.

value = sum_v f(log p_v, log r_v),   by_p = sum_v p_v df/dp_v,   by_r = sum_v r_v df/dr_v
dz_v = g (p_v df/dp_v - p_v by_p) of the logits of p, g (r_v df/dr_v - r_v by_r) of those of r

One program per row, or several where rows are few: each then stores the sums of its part, and a second kernel adds them
up in the order of the parts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .divergences import DIVERGENCES
from .vocabulary import (
    STAGES,
    aligned_rows,
    blocks_of,
    factors,
    keep_arguments,
    lanes_of,
    load_block,
    part_of,
    part_to_sum,
    row_begin,
    row_scale,
    row_strides,
    store_zeros,
    transformed,
    vector,
)

MOST_PARAMS = 2


class Head(NamedTuple):
    """Kernel argument: logits, and what makes log-probs of them. Each head has its own SOFTCAP and ALIGNED, whether 16
    bytes divide its rows' distance."""

    logits: Tensor
    keep: Tensor | None
    temperatures: Tensor | None
    lse: Tensor
    lse_rest: Tensor
    stride_batch: int
    stride_time: int
    keep_batch: int
    keep_time: int


class Row(NamedTuple):
    """A head's row: where it begins, how far its keep mask is from there, and what makes log-probs of its logits."""

    begin: tl.tensor
    keep_lag: tl.tensor
    scale: tl.tensor
    inner: tl.tensor
    lse: tl.tensor
    lse_rest: tl.tensor


@triton.jit
def _row(head, row, time, scale, inner, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    begin = row_begin(row, time, head.stride_batch, head.stride_time)
    if ALIGNED:
        begin = begin // VEC * VEC  # as it is; now the compiler knows, too
    keep_lag = row_begin(row, time, head.keep_batch, head.keep_time) - begin
    T: tl.constexpr = head.lse.dtype.element_ty
    factor, bend = row_scale(scale, head.temperatures, row, T), tl.full((), inner, T)
    return Row(begin, keep_lag, factor, bend, tl.load(head.lse + row), tl.load(head.lse_rest + row))


@triton.jit
def _log_prob(head, of, at, inside, SOFTCAP: tl.constexpr):
    """(log-prob, prob, dz / dx) of a block of a row; what is outside has no prob."""
    x, _ = load_block(head.logits, head.keep, at, of.keep_lag, inside, of.lse.dtype)
    z, bent = transformed(x, of.scale, of.inner, SOFTCAP)
    log_p = (z - of.lse) - of.lse_rest
    slope = of.scale * of.inner * (1 - bent * bent) if SOFTCAP else of.scale
    return log_p, tl.exp(log_p), slope


@triton.jit
def _diverged(log_p, log_r, p, r, params, KIND: tl.constexpr, NUM_PARAMS: tl.constexpr):
    if NUM_PARAMS == 0:
        value, by_p, by_r = KIND(log_p, log_r, p, r)
    elif NUM_PARAMS == 1:
        value, by_p, by_r = KIND(log_p, log_r, p, r, params[0])
    else:
        value, by_p, by_r = KIND(log_p, log_r, p, r, params[0], params[1])
    return value, by_p, by_r


@triton.jit
def _add_block(
    sums, heads, of, at, inside, params, KIND: tl.constexpr, NUM_PARAMS: tl.constexpr, SOFTCAP: tl.constexpr
):
    log_p, p, _ = _log_prob(heads[0], of[0], of[0].begin + at, inside, SOFTCAP[0])
    log_r, r, _ = _log_prob(heads[1], of[1], of[1].begin + at, inside, SOFTCAP[1])
    value, by_p, by_r = _diverged(log_p, log_r, p, r, params, KIND, NUM_PARAMS)
    return sums[0] + tl.sum(value, 1), sums[1] + tl.sum(by_p, 1), sums[2] + tl.sum(by_r, 1)


@triton.jit
def divergence_kernel(
    heads, rows, out, vocab, time, parts, scale: tl.float64, inner: tl.float64, other_scale: tl.float64,
    other_inner: tl.float64, first: tl.float64, second: tl.float64, KIND: tl.constexpr, NUM_PARAMS: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The three sums of a row, or of a part of it."""
    T: tl.constexpr = out[0].dtype.element_ty
    row, part = tl.program_id(0).to(tl.int64), 0
    if SPLIT:
        part = row % parts
        row = row // parts
    counts = True
    if rows is not None:
        counts = tl.load(rows + row) != 0
    none = tl.zeros((BLOCK // VEC,), T)
    sums, odd = (none, none, none), tl.zeros((), T)
    if counts:
        params = tl.full((), first, T), tl.full((), second, T)
        of = (
            _row(heads[0], row, time, scale, inner, ALIGNED[0], VEC),
            _row(heads[1], row, time, other_scale, other_inner, ALIGNED[1], VEC),
        )
        lanes = lanes_of(BLOCK, VEC)
        low, high = part_to_sum(0, vocab, part, parts, BLOCK, SPLIT)
        stop = low + tl.maximum(high - low, 0) // BLOCK * BLOCK
        for block in tl.range(low, stop, BLOCK, num_stages=STAGES):
            sums = _add_block(sums, heads, of, block + lanes, None, params, KIND, NUM_PARAMS, SOFTCAP)
        if stop < high:
            at = stop + lanes
            sums = _add_block(sums, heads, of, at, at < high, params, KIND, NUM_PARAMS, SOFTCAP)
        # Where a row has no distribution its lse is no number.
        odd = (of[0].lse - of[0].lse) + (of[1].lse - of[1].lse)
    for k in tl.static_range(3):
        tl.store(out[k] + tl.program_id(0), tl.sum(sums[k], 0) + odd)


@triton.jit
def divergence_merge_kernel(of_parts, out, parts, PARTS: tl.constexpr):
    """The sums of a row from those of its parts."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    for k in tl.static_range(3):
        found = tl.load(of_parts[k] + row * parts + part, mask=part < parts, other=0.0)
        tl.store(out[k] + row, tl.sum(found, 0))


@triton.jit
def _store_block(
    grad, heads, of, to, lag, inside, upstream, by, params, KIND: tl.constexpr, NUM_PARAMS: tl.constexpr,
    OF_OTHER: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    log_p, p, slope = _log_prob(heads[0], of[0], to + lag[0], inside, SOFTCAP[0])
    log_r, r, other_slope = _log_prob(heads[1], of[1], to + lag[1], inside, SOFTCAP[1])
    _, by_p, by_r = _diverged(log_p, log_r, p, r, params, KIND, NUM_PARAMS)
    if OF_OTHER:
        dx = tl.where(log_r == -float("inf"), 0.0, upstream * (by_r - r * by) * other_slope)
    else:
        dx = tl.where(log_p == -float("inf"), 0.0, upstream * (by_p - p * by) * slope)
    tl.store(grad + to, dx.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def divergence_backward_kernel(
    heads, rows, upstreams, bys, grad, vocab, time, parts, grad_batch, grad_time, scale: tl.float64, inner: tl.float64,
    other_scale: tl.float64, other_inner: tl.float64, first: tl.float64, second: tl.float64, KIND: tl.constexpr,
    NUM_PARAMS: tl.constexpr, OF_OTHER: tl.constexpr, SOFTCAP: tl.constexpr, SAME: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """SAME: of each head, whether its rows lie as those of the gradient."""
    T: tl.constexpr = bys.dtype.element_ty
    row, part = tl.program_id(0).to(tl.int64), 0
    if SPLIT:
        part = row % parts
        row = row // parts
    begin = row_begin(row, time, grad_batch, grad_time)
    low, high = part_of(begin, vocab, part, parts, BLOCK, VEC, SPLIT)
    upstream = tl.load(upstreams + row)
    counts = upstream != 0
    if rows is not None:
        counts = counts & (tl.load(rows + row) != 0)
    if not counts:
        store_zeros(grad, low, high, BLOCK)
    else:
        by, params = tl.load(bys + row), (tl.full((), first, T), tl.full((), second, T))
        of = (
            _row(heads[0], row, time, scale, inner, False, VEC),
            _row(heads[1], row, time, other_scale, other_inner, False, VEC),
        )
        # Blocks are aligned in the gradient; `lag` leads to the same logit of a padded or sliced input.
        here = tl.zeros((), tl.int64)
        lag = (here if SAME[0] else of[0].begin - begin, here if SAME[1] else of[1].begin - begin)
        lanes = lanes_of(BLOCK, VEC)
        top, start, stop = blocks_of(low, high, BLOCK, VEC)
        if top < low:
            to = top + lanes
            inside = (to >= low) & (to < high)
            _store_block(grad, heads, of, to, lag, inside, upstream, by, params, KIND, NUM_PARAMS, OF_OTHER, SOFTCAP)
        for block in tl.range(start, stop, BLOCK, num_stages=STAGES):
            to = block + lanes
            _store_block(grad, heads, of, to, lag, None, upstream, by, params, KIND, NUM_PARAMS, OF_OTHER, SOFTCAP)
        if stop < high:
            to = stop + lanes
            inside = to < high
            _store_block(grad, heads, of, to, lag, inside, upstream, by, params, KIND, NUM_PARAMS, OF_OTHER, SOFTCAP)


def _head(
    logits: Tensor, lse: Tensor, lse_rest: Tensor, temperature: float, temperatures: Tensor | None, softcap: float,
    logit_scale: float, keep_mask: Tensor | None,
) -> tuple[Head, tuple[float, float], bool]:  # fmt: skip
    """(the head, its scale and what is inside its softcap, whether it has one)."""
    scale, inner, capped = factors(temperature, softcap, logit_scale)
    kept, *keep_strides = keep_arguments(keep_mask)
    return Head(logits, kept, temperatures, lse, lse_rest, *row_strides(logits), *keep_strides), (scale, inner), capped


def _arguments(logits: Tensor, other: Tensor, given: tuple) -> tuple[tuple, tuple, tuple, int, dict]:
    """(heads and rows; vocab, time and parts; numbers; parts; options of a launch) of the arguments of the ops."""
    lse, rest, other_lse, other_rest, rows, *transforms, kind, params = given
    of, own, capped = _head(logits, lse, rest, *transforms[:5])
    of_other, others, other_capped = _head(other, other_lse, other_rest, *transforms[5:])
    *_, time, vocab = logits.shape
    parts = launch.vocab_parts(lse.numel(), vocab, logits.device)
    block = launch.vocab_block(vocab, logits.dtype, parts, heavy=True)
    how = {
        "KIND": DIVERGENCES[kind], "NUM_PARAMS": len(params), "SOFTCAP": (capped, other_capped), "SPLIT": parts > 1,
        "BLOCK": block, "VEC": vector(logits), "num_warps": launch.vocab_warps(block, 8),
    }  # fmt: skip
    numbers = (*own, *others, *[*params, 0.0, 0.0][:MOST_PARAMS])
    heads = ((of, of_other), None if rows is None else rows.view(torch.uint8))
    return heads, (vocab, time, parts), numbers, parts, how


def divergence(logits: Tensor, other_logits: Tensor, *given) -> tuple[Tensor, Tensor, Tensor]:
    """(the divergence, by_p, by_r) of each row, 0 where rows is false."""
    value, by_p, by_r = (torch.empty_like(given[0]) for _ in range(3))
    if not value.numel():
        return value, by_p, by_r
    heads, sizes, numbers, parts, how = _arguments(logits, other_logits, given)
    out, aligned = (value, by_p, by_r), (aligned_rows(logits), aligned_rows(other_logits))
    sums = out if parts == 1 else tuple(value.new_empty(value.numel() * parts) for _ in range(3))
    with launch.on_device_of(logits):
        divergence_kernel[(value.numel() * parts,)](*heads, sums, *sizes, *numbers, ALIGNED=aligned, **how)
        if parts > 1:
            divergence_merge_kernel[(value.numel(),)](
                sums, out, parts, PARTS=triton.next_power_of_2(parts), num_warps=1
            )
    return out


def divergence_backward(grad: Tensor, logits: Tensor, other_logits: Tensor, by: Tensor, of: str, *given) -> Tensor:
    """The gradient of the logits named `of`, contiguous, of their shape and dtype."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if by.numel():
        heads, sizes, numbers, parts, how = _arguments(logits, other_logits, given)
        same = tuple(row_strides(x) == row_strides(out) for x in (logits, other_logits))
        with launch.on_device_of(logits):
            divergence_backward_kernel[(by.numel() * parts,)](
                *heads, grad, by, out, *sizes, *row_strides(out), *numbers, OF_OTHER=of == "other_logits", SAME=same,
                **how,
            )  # fmt: skip
    return out
