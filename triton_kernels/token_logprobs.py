"""Op token_logprobs: one pass over each row of logits.

One program per row, or several where rows are few: each then stores the state of its part, and a second kernel merges
them in the order of the parts. A state is the running maximum m of z with, per lane, sums of e^(z - m), of
e^(z - m) (z - m), of e^2(z - m) and of z, and counts of the logits kept, of those above each id's own, and of those
equal to it at a smaller index; what no output needs stays a scalar 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import ALWAYS, FAKES
from . import launch
from .vocabulary import (
    IGNORED,
    STAGES,
    blocks_of,
    factors,
    keep_arguments,
    lanes_of,
    load_block,
    load_own,
    part_of,
    row_begin,
    row_scale,
    transformed,
    vector,
)

OUTPUTS = (*ALWAYS, "log_sum_sq_probs", "mean_logit", "max_prob", "is_top1", "rank")
SUMS = tl.constexpr(5)  # floats in the scratch memory per part: m and four sums


@triton.jit
def _empty(ROWS: tl.constexpr, KP: tl.constexpr, WANT: tl.constexpr, T: tl.constexpr):
    """State before the first block; WANT says which of squares, mean, kept, above and tied are wanted."""
    none, counts = tl.zeros((ROWS,), T), tl.zeros((ROWS if KP == 1 else KP,), tl.int32)
    zero, nothing = tl.zeros((), T), tl.zeros((), tl.int32)
    return (
        tl.full((), -float("inf"), T), none, none, none if WANT[0] else zero, none if WANT[1] else zero,
        tl.zeros((ROWS,), tl.int32) if WANT[2] else nothing, counts if WANT[3] else nothing,
        counts if WANT[4] else nothing,
    )  # fmt: skip


@triton.jit
def _moments(state, z, counted, WANT: tl.constexpr):
    """(m, total, weighted, squares, sum of z) with one more block: the exponential is taken once per logit."""
    m, total, weighted, squares, mean = state[0], state[1], state[2], state[3], state[4]
    highest = tl.maximum(m, tl.max(tl.max(z, 1), 0))
    # Until a finite logit is seen the maximum is -inf, and 0 stands in for it: e^-inf = 0.
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    moved = tl.where(m == -float("inf"), 0.0, m - shift)
    scale = tl.exp(moved)
    below = z - shift
    e = tl.exp(below)
    weighted = (weighted + moved * total) * scale + tl.sum(e * tl.maximum(below, -1e4), 1)  # finite: 0 * -inf is nan
    total = total * scale + tl.sum(e, 1)
    if WANT[0]:
        squares = squares * (scale * scale) + tl.sum(e * e, 1)
    if WANT[1]:
        mean += tl.sum(tl.where(counted, z, 0.0), 1)
    return highest, total, weighted, squares, mean


@triton.jit
def _count(x, own, before, lanes, inside, TIES: tl.constexpr):
    """How many of a block, per lane: above `own`, or equal to it in the lanes `before`."""
    hits = (x == own) & (lanes < before) if TIES else x > own
    if TIES and inside is not None:
        hits = hits & inside
    return tl.sum(hits.to(tl.int32), 1)


@triton.jit
def _order(counts, x, own, before, lanes, inside, slot, K, KP: tl.constexpr, TIES: tl.constexpr):
    """Counts per lane for one id, and one per id for several."""
    if KP == 1:
        counts += _count(x, own[None, :], before[None, :], lanes, inside, TIES)
    else:
        for k in range(K):
            chosen = slot == k
            own_k, before_k = tl.sum(tl.where(chosen, own, 0.0), 0), tl.sum(tl.where(chosen, before, 0), 0)
            counts += tl.where(chosen, tl.sum(_count(x, own_k, before_k, lanes, inside, TIES), 0), 0)
    return counts


@triton.jit
def _block(
    state, logits, keep, block, lanes, inside, keep_lag, own, own_at, slot, K, scale, inner, KP: tl.constexpr,
    WANT: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    x, counted = load_block(logits, keep, block + lanes, keep_lag, inside, T)
    z, _ = transformed(x, scale, inner, SOFTCAP)
    m, total, weighted, squares, mean = _moments(state, z, counted, WANT)
    kept, above, tied = state[5], state[6], state[7]
    before = (own_at - block).to(tl.int32)
    if WANT[2]:
        kept += tl.sum(counted.to(tl.int32), 1)
    if WANT[3]:
        above = _order(above, x, own, before, lanes, inside, slot, K, KP, False)
    if WANT[4]:
        tied = _order(tied, x, own, before, lanes, inside, slot, K, KP, True)
    return m, total, weighted, squares, mean, kept, above, tied


@triton.jit
def _walk(
    state, logits, keep, low, high, keep_lag, own, own_at, slot, K, scale, inner, KP: tl.constexpr, WANT: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The state with the logits from low to high."""
    lanes = lanes_of(BLOCK, VEC)
    first, start, stop = blocks_of(low, high, BLOCK, VEC)
    if first < low:
        at = first + lanes
        state = _block(
            state, logits, keep, first, lanes, (at >= low) & (at < high), keep_lag, own, own_at, slot, K, scale, inner,
            KP, WANT, SOFTCAP, T,
        )  # fmt: skip
    for block in tl.range(start, stop, BLOCK, num_stages=STAGES):
        state = _block(
            state, logits, keep, block, lanes, None, keep_lag, own, own_at, slot, K, scale, inner, KP, WANT, SOFTCAP, T
        )
    if stop < high:
        state = _block(
            state, logits, keep, stop, lanes, stop + lanes < high, keep_lag, own, own_at, slot, K, scale, inner,
            KP, WANT, SOFTCAP, T,
        )  # fmt: skip
    return state


@triton.jit
def _over_lanes(counts, KP: tl.constexpr):
    """Counts per id, of which one id has as many as lanes."""
    return tl.sum(counts, 0, keep_dims=True) if KP == 1 else counts


@triton.jit
def _leave(
    scratch, counts, row, part, parts, K, slot, real, state, KP: tl.constexpr, WANT: tl.constexpr
):
    """Stores the state of a part; counts are added, integers, so that their order does not matter."""
    to = scratch + row * SUMS * parts + part
    tl.store(to, state[0])
    tl.store(to + parts, tl.sum(state[1], 0))
    tl.store(to + 2 * parts, tl.sum(state[2], 0))
    if WANT[0]:
        tl.store(to + 3 * parts, tl.sum(state[3], 0))
    if WANT[1]:
        tl.store(to + 4 * parts, tl.sum(state[4], 0))
    at = counts + row * (1 + 2 * K)
    if WANT[2]:
        tl.atomic_add(at, tl.sum(state[5], 0), sem="relaxed")
    if WANT[3]:
        tl.atomic_add(at + 1 + slot, _over_lanes(state[6], KP), mask=real, sem="relaxed")
    if WANT[4]:
        tl.atomic_add(at + 1 + K + slot, _over_lanes(state[7], KP), mask=real, sem="relaxed")


@triton.jit
def _store_row(
    out, row, at, real, used, known, z_own, m, mass, weighted, squares, mean, kept, above, tied, T: tl.constexpr
):
    """Results of a row from its sums; z_own, above and tied are one per id."""
    log_mass = tl.log(mass)
    tl.store(out[0] + at, tl.where(used, (z_own - m) - log_mass, 0.0), mask=real)
    tl.store(out[1] + row, log_mass - weighted / mass)
    tl.store(out[2] + row, m + log_mass)
    if out[3] is not None:
        tl.store(out[3] + row, tl.log(squares) - 2 * log_mass)
    if out[4] is not None:
        tl.store(out[4] + row, mean / kept.to(T))
    if out[5] is not None:
        tl.store(out[5] + row, tl.where(mass > 0, 1 / mass, float("nan")))
    if out[6] is not None:
        tl.store(out[6] + at, (known & (above == 0) & (tied == 0)).to(tl.uint8), mask=real)
    if out[7] is not None:
        tl.store(out[7] + at, tl.where(known, above.to(tl.int64) + 1, 0), mask=real)


@triton.jit
def _store_zeros(out, row, at, real):
    for k in tl.static_range(8):
        if out[k] is not None:
            if k == 0 or k >= 6:
                tl.store(out[k] + at, 0, mask=real)
            else:
                tl.store(out[k] + row, 0)


@triton.jit
def forward_kernel(
    logits, ids, temperatures, keep, out, scratch, counts, time, vocab, K, parts, stride_batch, stride_time,
    keep_batch, keep_time, scale: tl.float64, inner: tl.float64, KP: tl.constexpr, WANT: tl.constexpr,
    SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = out[0].dtype.element_ty
    row, part = tl.program_id(0).to(tl.int64), 0
    if SPLIT:
        part = row % parts
        row = row // parts
    slot = tl.arange(0, KP)
    at, real = row * K + slot, slot < K
    id = tl.load(ids + at, mask=real, other=IGNORED)
    used = id != IGNORED
    if tl.max(used.to(tl.int32), 0) == 0:
        if not SPLIT:
            _store_zeros(out, row, at, real)
    else:
        begin = row_begin(row, time, stride_batch, stride_time)
        keep_begin = row_begin(row, time, keep_batch, keep_time)
        factor, bend = row_scale(scale, temperatures, row, T), tl.full((), inner, T)
        known = (id >= 0) & (id < vocab)
        own, _ = load_own(logits, keep, begin, keep_begin, id, known, T)
        low, high = part_of(begin, vocab, part, parts, BLOCK, VEC, SPLIT)
        state = _walk(
            _empty(BLOCK // VEC, KP, WANT, T), logits, keep, low, high, keep_begin - begin, own, begin + id, slot, K,
            factor, bend, KP, WANT, SOFTCAP, BLOCK, VEC, T,
        )  # fmt: skip
        if SPLIT:
            _leave(scratch, counts, row, part, parts, K, slot, real, state, KP, WANT)
        else:
            z_own, _ = transformed(own, factor, bend, SOFTCAP)
            kept = tl.sum(state[5], 0) if WANT[2] else vocab + tl.zeros((), tl.int32)
            above = _over_lanes(state[6], KP) if WANT[3] else state[6]
            tied = _over_lanes(state[7], KP) if WANT[4] else state[7]
            squares = tl.sum(state[3], 0) if WANT[0] else state[3]
            mean = tl.sum(state[4], 0) if WANT[1] else state[4]
            _store_row(
                out, row, at, real, used, known, z_own, state[0], tl.sum(state[1], 0), tl.sum(state[2], 0), squares,
                mean, kept, above, tied, T,
            )  # fmt: skip


@triton.jit
def merge_kernel(
    logits, ids, temperatures, keep, out, scratch, counts, time, vocab, K, parts, stride_batch, stride_time,
    keep_batch, keep_time, scale: tl.float64, inner: tl.float64, KP: tl.constexpr, WANT: tl.constexpr,
    SOFTCAP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Results of a row from the states of its parts."""
    T: tl.constexpr = out[0].dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    slot, part = tl.arange(0, KP), tl.arange(0, PARTS)
    at, real = row * K + slot, slot < K
    id = tl.load(ids + at, mask=real, other=IGNORED)
    used = id != IGNORED
    if tl.max(used.to(tl.int32), 0) == 0:
        _store_zeros(out, row, at, real)
    else:
        here, those = scratch + row * SUMS * parts + part, part < parts
        m_part = tl.load(here, mask=those, other=-float("inf"))
        m = tl.max(m_part, 0)
        moved = tl.where(m_part == -float("inf"), 0.0, m_part - tl.where(m == -float("inf"), 0.0, m))
        factor = tl.exp(moved)
        total = tl.load(here + parts, mask=those, other=0.0)
        weighted = tl.load(here + 2 * parts, mask=those, other=0.0) + moved * total
        squares, mean = tl.zeros((), T), tl.zeros((), T)
        if WANT[0]:
            squares = tl.sum(tl.load(here + 3 * parts, mask=those, other=0.0) * (factor * factor), 0)
        if WANT[1]:
            mean = tl.sum(tl.load(here + 4 * parts, mask=those, other=0.0), 0)
        counted = counts + row * (1 + 2 * K)
        kept = tl.load(counted) if WANT[2] else vocab + tl.zeros((), tl.int32)
        above = tl.load(counted + 1 + slot, mask=real, other=0) if WANT[3] else tl.zeros((), tl.int32)
        tied = tl.load(counted + 1 + K + slot, mask=real, other=0) if WANT[4] else tl.zeros((), tl.int32)
        known = (id >= 0) & (id < vocab)
        begin = row_begin(row, time, stride_batch, stride_time)
        own, _ = load_own(logits, keep, begin, row_begin(row, time, keep_batch, keep_time), id, known, T)
        z_own, _ = transformed(own, row_scale(scale, temperatures, row, T), tl.full((), inner, T), SOFTCAP)
        _store_row(
            out, row, at, real, used, known, z_own, m, tl.sum(total * factor, 0), tl.sum(weighted * factor, 0),
            squares, mean, kept, above, tied, T,
        )  # fmt: skip


def token_logprobs(
    logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, softcap: float, logit_scale: float,
    keep_mask: Tensor | None, outputs: list[str], inplace_backward: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results that tokenrl/contract.py names, in its order; those neither in ALWAYS nor in outputs are empty."""
    results = FAKES["token_logprobs"](logits, ids, 1.0, None, 1.0, 1.0, None, outputs, False)
    _, time, vocab = logits.shape
    rows, per_row = ids.shape[0] * time, ids.shape[-1]
    if rows == 0:
        return results
    wanted = [name in ALWAYS or name in outputs for name in OUTPUTS]
    out = tuple(_bytes(x) if want else None for x, want in zip(results, wanted, strict=True))
    squares, mean, _, top1, rank = wanted[3:]
    want = (squares, mean, mean and keep_mask is not None, top1 or rank, top1)
    scale, inner, capped = factors(temperature, softcap, logit_scale)
    parts = launch.vocab_parts(rows, vocab, logits.device)
    scratch = counts = None
    if parts > 1:
        scratch = results[1].new_empty(rows * SUMS.value * parts)
        counts = ids.new_zeros(rows * (1 + 2 * per_row), dtype=torch.int32) if any(want[2:]) else None
    block = launch.vocab_block(vocab, logits.dtype, parts)
    kept, *keep_strides = keep_arguments(keep_mask)
    common = (
        logits, ids, temperatures, kept, out, scratch, counts, time, vocab, per_row, parts, *logits.stride()[:2],
        *keep_strides, scale, inner,
    )  # fmt: skip
    how = {"KP": triton.next_power_of_2(per_row), "WANT": want, "SOFTCAP": capped}
    with launch.on_device_of(logits):
        forward_kernel[(rows * parts,)](
            *common, **how, SPLIT=parts > 1, BLOCK=block, VEC=vector(logits), num_warps=launch.vocab_warps(block)
        )
        if parts > 1:
            merge_kernel[(rows,)](*common, **how, PARTS=triton.next_power_of_2(parts), num_warps=1)
    return results


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.bool else x
