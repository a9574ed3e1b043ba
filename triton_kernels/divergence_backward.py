"""Op divergence_backward: the gradient of either head's logits, both of which are read once.

dz_v = g (p_v df/dp_v - p_v by_p) of the logits of p, g (r_v df/dr_v - r_v by_r) of those of r
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pair_row import Strides, call_of, diverged, load_z, log_prob, lse_of, row_of
from .vocabulary import (
    STAGES,
    aligned_rows,
    blocks_of,
    in_packs,
    lanes_of,
    part_of,
    row_begin,
    row_strides,
    store_zeros,
)


@triton.jit
def _store_block(
    grad, heads, of, lse, to, lag, inside, upstream, by, params, KIND: tl.constexpr, NUM_PARAMS: tl.constexpr,
    OF_OTHER: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    z, slope = load_z(heads[0], of[0], to + lag[0], inside, SOFTCAP[0])
    other_z, other_slope = load_z(heads[1], of[1], to + lag[1], inside, SOFTCAP[1])
    log_p, p = log_prob(z, lse[0])
    log_r, r = log_prob(other_z, lse[1])
    _, by_p, by_r = diverged(log_p, log_r, p, r, params, KIND, NUM_PARAMS)
    if OF_OTHER:
        dx = tl.where(log_r == -float("inf"), 0.0, upstream * (by_r - r * by) * other_slope)
    else:
        dx = tl.where(log_p == -float("inf"), 0.0, upstream * (by_p - p * by) * slope)
    tl.store(grad + to, dx.to(grad.dtype.element_ty), mask=inside)


@launch.kernel
def divergence_backward_kernel(
    heads, stride_batch, stride_time, keep_batch, keep_time, other_batch, other_time, other_keep_batch,
    other_keep_time, counted, statistics, upstreams, bys, grad, rows, vocab, time, parts, grad_batch, grad_time,
    scale: tl.float64, inner: tl.float64, other_scale: tl.float64, other_inner: tl.float64, first: tl.float64,
    second: tl.float64, KIND: tl.constexpr, NUM_PARAMS: tl.constexpr, OF_OTHER: tl.constexpr, SOFTCAP: tl.constexpr,
    SAME: tl.constexpr, ALIGNED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """SAME: of each head, whether its rows lie as those of the gradient; ALIGNED: whether they and these are."""
    T: tl.constexpr = bys.dtype.element_ty
    row, part = tl.program_id(0).to(tl.int64), 0
    if SPLIT:
        part = row % parts
        row = row // parts
    begin = row_begin(row, time, grad_batch, grad_time)
    low, high = part_of(begin, vocab, part, parts, BLOCK, VEC, SPLIT)
    upstream = tl.load(upstreams + row)
    counts = upstream != 0
    if counted is not None:
        counts = counts & (tl.load(counted + row) != 0)
    if not counts:
        store_zeros(grad, low, high, BLOCK)
    else:
        by, params = tl.load(bys + row), (tl.full((), first, T), tl.full((), second, T))
        strides = Strides(stride_batch, stride_time, keep_batch, keep_time)
        other_strides = Strides(other_batch, other_time, other_keep_batch, other_keep_time)
        of = (
            row_of(heads[0], strides, row, time, scale, inner, ALIGNED[0], VEC, T),
            row_of(heads[1], other_strides, row, time, other_scale, other_inner, ALIGNED[1], VEC, T),
        )
        lse = (lse_of(statistics, row, rows, 0), lse_of(statistics, row, rows, 1))
        # Blocks are aligned in the gradient; `lag` leads to the same logit of a padded or sliced input.
        here = tl.zeros((), tl.int64)
        lag = (
            here if SAME[0] else in_packs(of[0].begin - begin, ALIGNED[0], VEC),
            here if SAME[1] else in_packs(of[1].begin - begin, ALIGNED[1], VEC),
        )
        lanes = lanes_of(BLOCK, VEC)
        top, start, stop = blocks_of(low, high, BLOCK, VEC)
        if top < low:
            to = top + lanes
            inside = (to >= low) & (to < high)
            _store_block(
                grad, heads, of, lse, to, lag, inside, upstream, by, params, KIND, NUM_PARAMS, OF_OTHER, SOFTCAP
            )
        for block in tl.range(start, stop, BLOCK, num_stages=STAGES):
            to = block + lanes
            _store_block(grad, heads, of, lse, to, lag, None, upstream, by, params, KIND, NUM_PARAMS, OF_OTHER, SOFTCAP)
        if stop < high:
            to = stop + lanes
            inside = to < high
            _store_block(
                grad, heads, of, lse, to, lag, inside, upstream, by, params, KIND, NUM_PARAMS, OF_OTHER, SOFTCAP
            )


def divergence_backward(
    grad: Tensor, logits: Tensor, other_logits: Tensor, by: Tensor, of: str, statistics: Tensor, *given
) -> Tensor:
    """The gradient of the logits named `of`, contiguous, of their shape and dtype."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if by.numel():
        call = call_of(logits, other_logits, given)
        call.launch["ALIGNED"] = tuple(aligned and aligned_rows(out) for aligned in call.launch["ALIGNED"])
        same = tuple(row_strides(x) == row_strides(out) for x in (logits, other_logits))
        with launch.on_device_of(logits):
            divergence_backward_kernel[(by.numel() * call.sizes[-1],)](
                call.heads, *call.strides, call.counted, statistics, grad, by, out, by.numel(), *call.sizes,
                *row_strides(out), *call.scales, *call.params, OF_OTHER=of == "other_logits", SAME=same, **call.kind,
                **call.launch,
            )  # fmt: skip
    return out
