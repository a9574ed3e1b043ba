"""Ops token_logprobs_backward and token_logprobs_backward_: the gradient of the logits, in one pass over each row.

    dz_v = p_v (a + b log p_v + c p_v) + sum_j g_logp_j 1[v = id_j],   dx_v = dz_v dz_v / dx_v,
    a = -sum_j g_logp_j + g_lse - g_entropy entropy - 2 g_lss,   b = -g_entropy,   c = 2 g_lss e^-lss.

The blocks of a row are written without the terms of the ids. These logits are gathered before anything is written, as
the gradient may be in the logits' own memory, and their gradients stored again after the blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .vocabulary import (
    IGNORED,
    STAGES,
    aligned_rows,
    blocks_of,
    factors,
    ids_per_row,
    in_packs,
    keep_arguments,
    lanes_of,
    load_block,
    load_own,
    part_of,
    row_begin,
    row_scale,
    row_strides,
    store_zeros,
    transformed,
    vector,
)


@triton.jit
def _softmax_part(x, scale, inner, lse, rest, a, b, c, SOFTCAP: tl.constexpr):
    """(dx without the terms of the ids, dz / dx)."""
    z, bent = transformed(x, scale, inner, SOFTCAP)
    log_p = (z - lse) - rest
    p = tl.exp(log_p)
    g = a
    if b is not None:
        g += b * tl.where(p == 0.0, 0.0, log_p)
    if c is not None:
        g += c * p
    slope = scale * inner * (1 - bent * bent) if SOFTCAP else scale
    return p * g * slope, slope


@triton.jit
def _block(logits, keep, grad, to, lag, keep_lag, inside, scale, inner, lse, rest, a, b, c, SOFTCAP: tl.constexpr):
    x, _ = load_block(logits, keep, to + lag, keep_lag, inside, lse.dtype)
    value, _ = _softmax_part(x, scale, inner, lse, rest, a, b, c, SOFTCAP)
    tl.store(grad + to, value.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _walk(
    logits, keep, grad, low, high, lag, keep_lag, scale, inner, lse, rest, a, b, c, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    lanes = lanes_of(BLOCK, VEC)
    first, start, stop = blocks_of(low, high, BLOCK, VEC)
    if first < low:
        to = first + lanes
        inside = (to >= low) & (to < high)
        _block(logits, keep, grad, to, lag, keep_lag, inside, scale, inner, lse, rest, a, b, c, SOFTCAP)
    for block in tl.range(start, stop, BLOCK, num_stages=STAGES):
        _block(logits, keep, grad, block + lanes, lag, keep_lag, None, scale, inner, lse, rest, a, b, c, SOFTCAP)
    if stop < high:
        to = stop + lanes
        _block(logits, keep, grad, to, lag, keep_lag, to < high, scale, inner, lse, rest, a, b, c, SOFTCAP)


@triton.jit
def _row_scalar(values, row, T: tl.constexpr):
    return tl.zeros((), T) if values is None else tl.load(values + row)


@triton.jit
def _own_gradient(grad_logp, ids, row, id, g_logp, K, KP: tl.constexpr):
    """Per id the sum of the gradients of all equal to it."""
    if grad_logp is None or KP == 1:
        return g_logp
    else:
        own = tl.zeros_like(g_logp)
        for k in range(K):
            own += tl.where(tl.load(ids + row * K + k) == id, tl.load(grad_logp + row * K + k), 0.0)
        return own


@triton.jit
def _upstream(grad_logp, grad_entropy, grad_lse, grad_squares, ids, row, slot, K, KP: tl.constexpr, T: tl.constexpr):
    """Of a row: its ids, which of them are used, the upstream gradients, whether one is not 0 and an id is used."""
    at = row * K + slot
    id = tl.load(ids + at, mask=slot < K, other=IGNORED)
    used = id != IGNORED
    g_logp = tl.zeros((KP,), T)
    if grad_logp is not None:
        g_logp = tl.load(grad_logp + at, mask=used, other=0.0)
    g_entropy, g_lse = _row_scalar(grad_entropy, row, T), _row_scalar(grad_lse, row, T)
    g_squares = _row_scalar(grad_squares, row, T)
    some = tl.max(tl.where(used & (g_logp != 0.0), 1, 0), 0) > 0
    some = some | (g_entropy != 0.0) | (g_lse != 0.0) | (g_squares != 0.0)
    return id, used, g_logp, g_entropy, g_lse, g_squares, some & (tl.max(used.to(tl.int32), 0) > 0)


@launch.kernel
def backward_kernel(
    grad_logp, grad_entropy, grad_lse, grad_squares, logits, ids, lse_in, rest_in, entropy_in, squares_in, temperatures,
    keep, grad, time, vocab, K, parts, stride_batch, stride_time, grad_batch, grad_time, keep_batch, keep_time,
    scale: tl.float64, inner: tl.float64, KP: tl.constexpr, SOFTCAP: tl.constexpr, SAME: tl.constexpr,
    ALIGNED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = lse_in.dtype.element_ty
    row, part = tl.program_id(0).to(tl.int64), 0
    if SPLIT:
        part = row % parts
        row = row // parts
    slot = tl.arange(0, KP)
    id, used, g_logp, g_entropy, g_lse, g_squares, some = _upstream(
        grad_logp, grad_entropy, grad_lse, grad_squares, ids, row, slot, K, KP, T
    )
    begin = row_begin(row, time, grad_batch, grad_time)
    low, high = part_of(begin, vocab, part, parts, BLOCK, VEC, SPLIT)
    if not some:
        store_zeros(grad, low, high, BLOCK)
    else:
        # Blocks are aligned in the gradient; `lag` leads to the same logit of a padded or sliced input.
        lag = tl.zeros((), tl.int64)
        if not SAME:
            lag = in_packs(row_begin(row, time, stride_batch, stride_time) - begin, ALIGNED, VEC)
        keep_lag = in_packs(row_begin(row, time, keep_batch, keep_time) - begin - lag, ALIGNED, VEC)
        factor, bend = row_scale(scale, temperatures, row, T), tl.full((), inner, T)
        mine = used & (id >= low - begin) & (id < high - begin)
        own, kept = load_own(logits, keep, begin + lag, begin + lag + keep_lag, id, mine, T)
        lse, rest = tl.load(lse_in + row), tl.load(rest_in + row)
        a = g_lse - tl.sum(g_logp, 0)
        b, c = None, None
        if grad_entropy is not None:
            a -= g_entropy * tl.load(entropy_in + row)
            b = -g_entropy
        if grad_squares is not None:
            a -= 2 * g_squares
            c = 2 * g_squares * tl.exp(-tl.load(squares_in + row))
        _walk(
            logits, keep, grad, low, high, lag, keep_lag, factor, bend, lse, rest, a, b, c, SOFTCAP, BLOCK, VEC,
        )  # fmt: skip
        if grad_logp is not None:
            value, slope = _softmax_part(own, factor, bend, lse, rest, a, b, c, SOFTCAP)
            g_own = _own_gradient(grad_logp, ids, row, id, g_logp, K, KP)
            alive = kept & (own != -float("inf")) if SOFTCAP else kept
            value += tl.where(alive, g_own, 0.0) * slope
            tl.debug_barrier()  # the blocks' stores come first
            tl.store(grad + begin + id, value.to(grad.dtype.element_ty), mask=mine)


def _backward(
    grads: tuple, logits: Tensor, grad: Tensor, ids: Tensor, lse: Tensor, lse_rest: Tensor, entropy: Tensor,
    log_sum_sq_probs: Tensor, temperature: float, temperatures: Tensor | None, softcap: float, logit_scale: float,
    keep_mask: Tensor | None,
) -> None:  # fmt: skip
    """Writes the gradient into `grad`, which may be logits."""
    *_, time, vocab = logits.shape
    rows, per_row = logits.shape[:-1].numel(), ids_per_row(ids, logits)
    if rows == 0:
        return
    scale, inner, capped = factors(temperature, softcap, logit_scale)
    parts = launch.vocab_parts(rows, vocab, logits.device)
    block = launch.vocab_block(vocab, logits.dtype, parts, heavy=capped)
    kept, *keep_strides = keep_arguments(keep_mask)
    with launch.on_device_of(logits):
        backward_kernel[(rows * parts,)](
            *grads, logits, ids, lse, lse_rest, entropy, log_sum_sq_probs, temperatures, kept, grad, time, vocab,
            per_row, parts, *row_strides(logits), *row_strides(grad), *keep_strides, scale, inner,
            KP=triton.next_power_of_2(per_row), SOFTCAP=capped, SAME=row_strides(logits) == row_strides(grad),
            ALIGNED=aligned_rows(logits, grad, keep_mask), SPLIT=parts > 1, BLOCK=block, VEC=vector(logits),
            num_warps=launch.vocab_warps(block, 8 if capped else 16),
        )  # fmt: skip


def token_logprobs_backward(
    grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None,
    grad_log_sum_sq_probs: Tensor | None, logits: Tensor, *rest,
) -> Tensor:  # fmt: skip
    """Gradient with respect to logits, contiguous, in their shape and dtype; rows without a gradient are not read."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward((grad_logp, grad_entropy, grad_lse, grad_log_sum_sq_probs), logits, grad, *rest)
    return grad


def token_logprobs_backward_(
    grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None,
    grad_log_sum_sq_probs: Tensor | None, logits: Tensor, *rest,
) -> None:  # fmt: skip
    """token_logprobs_backward into the memory of logits."""
    _backward((grad_logp, grad_entropy, grad_lse, grad_log_sum_sq_probs), logits, logits, *rest)
