"""Ops divergence and divergence_backward: two heads' rows of logits side by side, one program per row.

value = sum_v f(log p_v, log r_v),   by_p = sum_v p_v df/dp_v,   by_r = sum_v r_v df/dr_v
dz_v = g (p_v df/dp_v - p_v by_p) of the logits of p, g (r_v df/dr_v - r_v by_r) of those of r
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .divergences import DIVERGENCES
from .vocabulary import (
    factors,
    keep_arguments,
    load_block,
    row_begin,
    row_scale,
    row_strides,
    transformed,
)

MOST_PARAMS = 2


@triton.jit
def _log_prob(x, scale, inner, lse, rest, SOFTCAP: tl.constexpr):
    """(log-prob, prob, dz / dx)."""
    z, bent = transformed(x, scale, inner, SOFTCAP)
    log_p = (z - lse) - rest
    slope = scale * inner * (1 - bent * bent) if SOFTCAP else scale
    return log_p, tl.exp(log_p), slope


@triton.jit
def _diverged(log_p, log_r, p, r, first, second, KIND: tl.constexpr, NUM_PARAMS: tl.constexpr):
    if NUM_PARAMS == 0:
        value, by_p, by_r = KIND(log_p, log_r, p, r)
    elif NUM_PARAMS == 1:
        value, by_p, by_r = KIND(log_p, log_r, p, r, first)
    else:
        value, by_p, by_r = KIND(log_p, log_r, p, r, first, second)
    return value, by_p, by_r


@triton.jit
def _logits(head, row, at, inside, time, T: tl.constexpr):
    """A block of a head's row."""
    begin = row_begin(row, time, head[5], head[6])
    x, _ = load_block(head[0], head[1], begin + at, row_begin(row, time, head[7], head[8]) - begin, inside, T)
    return x


@triton.jit
def _pair(
    of, other, row, at, inside, time, numbers, T: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr
):  # fmt: skip
    """The two heads' log-probs, probs and slopes of a block."""
    x, y = _logits(of, row, at, inside, time, T), _logits(other, row, at, inside, time, T)
    log_p, p, slope = _log_prob(x, numbers[0], numbers[1], tl.load(of[3] + row), tl.load(of[4] + row), SOFTCAP)
    log_r, r, other_slope = _log_prob(
        y, numbers[2], numbers[3], tl.load(other[3] + row), tl.load(other[4] + row), OTHER_SOFTCAP
    )
    return log_p, log_r, p, r, slope, other_slope


@triton.jit
def _numbers(of, other, row, scale, inner, other_scale, other_inner, T: tl.constexpr):
    """Of a row: the scales of both heads under their temperatures, and what is inside their softcaps."""
    return (
        row_scale(scale, of[2], row, T), tl.full((), inner, T), row_scale(other_scale, other[2], row, T),
        tl.full((), other_inner, T),
    )  # fmt: skip


@triton.jit
def forward_kernel(
    of, other, rows, value, by_p, by_r, vocab, time, scale: tl.float64, inner: tl.float64, other_scale: tl.float64,
    other_inner: tl.float64, first: tl.float64, second: tl.float64, KIND: tl.constexpr, NUM_PARAMS: tl.constexpr,
    SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = value.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    counts = True
    if rows is not None:
        counts = tl.load(rows + row) != 0
    total = tl.zeros((BLOCK,), T)
    total_p, total_r = tl.zeros((BLOCK,), T), tl.zeros((BLOCK,), T)
    odd = tl.zeros((), T)
    if counts:
        alpha, beta = tl.full((), first, T), tl.full((), second, T)
        numbers = _numbers(of, other, row, scale, inner, other_scale, other_inner, T)
        for block in tl.range(0, vocab, BLOCK):
            at = block + tl.arange(0, BLOCK)
            log_p, log_r, p, r, _, _ = _pair(of, other, row, at, at < vocab, time, numbers, T, SOFTCAP, OTHER_SOFTCAP)
            f, a, b = _diverged(log_p, log_r, p, r, alpha, beta, KIND, NUM_PARAMS)
            total += f
            total_p += a
            total_r += b
        # Where a row has no distribution its lse is no number.
        odd = (tl.load(of[3] + row) - tl.load(of[3] + row)) + (tl.load(other[3] + row) - tl.load(other[3] + row))
    tl.store(value + row, tl.sum(total, 0) + odd)
    tl.store(by_p + row, tl.sum(total_p, 0) + odd)
    tl.store(by_r + row, tl.sum(total_r, 0) + odd)


@triton.jit
def backward_kernel(
    of, other, rows, grad, by, out, vocab, time, out_batch, out_time, scale: tl.float64, inner: tl.float64,
    other_scale: tl.float64, other_inner: tl.float64, first: tl.float64, second: tl.float64, KIND: tl.constexpr,
    NUM_PARAMS: tl.constexpr, OF_OTHER: tl.constexpr, SOFTCAP: tl.constexpr, OTHER_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = by.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    begin = row_begin(row, time, out_batch, out_time)
    upstream = tl.load(grad + row)
    counts = upstream != 0
    if rows is not None:
        counts = counts & (tl.load(rows + row) != 0)
    if counts:
        sums = tl.load(by + row)
        alpha, beta = tl.full((), first, T), tl.full((), second, T)
        numbers = _numbers(of, other, row, scale, inner, other_scale, other_inner, T)
        for block in tl.range(0, vocab, BLOCK):
            at = block + tl.arange(0, BLOCK)
            log_p, log_r, p, r, slope, other_slope = _pair(
                of, other, row, at, at < vocab, time, numbers, T, SOFTCAP, OTHER_SOFTCAP
            )
            _, a, b = _diverged(log_p, log_r, p, r, alpha, beta, KIND, NUM_PARAMS)
            if OF_OTHER:
                dz = tl.where(log_r == -float("inf"), 0.0, upstream * (b - r * sums) * other_slope)
            else:
                dz = tl.where(log_p == -float("inf"), 0.0, upstream * (a - p * sums) * slope)
            tl.store(out + begin + at, dz.to(out.dtype.element_ty), mask=at < vocab)
    else:
        for block in tl.range(0, vocab, BLOCK):
            at = block + tl.arange(0, BLOCK)
            tl.store(out + begin + at, tl.zeros((BLOCK,), out.dtype.element_ty), mask=at < vocab)


def _head(
    logits: Tensor, lse: Tensor, lse_rest: Tensor, temperature: float, temperatures: Tensor | None, softcap: float,
    logit_scale: float, keep_mask: Tensor | None,
) -> tuple[tuple, tuple[float, float], bool]:  # fmt: skip
    """What the kernels know of a head, its scale and what is inside its softcap, and whether it has one."""
    scale, inner, capped = factors(temperature, softcap, logit_scale)
    kept, *keep_strides = keep_arguments(keep_mask)
    return (logits, kept, temperatures, lse, lse_rest, *row_strides(logits), *keep_strides), (scale, inner), capped


def _heads(logits: Tensor, other: Tensor, given: tuple) -> tuple:
    """(the two heads, rows, options of a launch, its parameters) of the arguments of the ops."""
    lse, rest, other_lse, other_rest, rows, *transforms, kind, params = given
    of, own, capped = _head(logits, lse, rest, *transforms[:5])
    of_other, others, other_capped = _head(other, other_lse, other_rest, *transforms[5:])
    block = launch.vocab_block(logits.shape[-1], logits.dtype, heavy=True)
    how = {"KIND": DIVERGENCES[kind], "NUM_PARAMS": len(params), "SOFTCAP": capped, "OTHER_SOFTCAP": other_capped,
           "BLOCK": block, "num_warps": launch.vocab_warps(block, heavy=True)}  # fmt: skip
    numbers = (*own, *others, *[*params, 0.0, 0.0][:MOST_PARAMS])
    return of, of_other, None if rows is None else rows.view(torch.uint8), how, numbers


def divergence(logits: Tensor, other_logits: Tensor, *given) -> tuple[Tensor, Tensor, Tensor]:
    """(the divergence, by_p, by_r) of each row, 0 where rows is false."""
    of, other, rows, how, numbers = _heads(logits, other_logits, given)
    value, by_p, by_r = (torch.empty_like(given[0]) for _ in range(3))
    if value.numel():
        *_, time, vocab = logits.shape
        with launch.on_device_of(logits):
            forward_kernel[(value.numel(),)](of, other, rows, value, by_p, by_r, vocab, time, *numbers, **how)
    return value, by_p, by_r


def divergence_backward(grad: Tensor, logits: Tensor, other_logits: Tensor, by: Tensor, of: str, *given) -> Tensor:
    """The gradient of the logits named `of`, contiguous, of their shape and dtype."""
    head, other, rows, how, numbers = _heads(logits, other_logits, given)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if by.numel():
        *_, time, vocab = logits.shape
        with launch.on_device_of(logits):
            backward_kernel[(by.numel(),)](
                head, other, rows, grad, by, out, vocab, time, *row_strides(out), *numbers,
                OF_OTHER=of == "other_logits", **how,
            )  # fmt: skip
    return out
