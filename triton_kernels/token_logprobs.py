"""Op token_logprobs: one pass over each row of logits.

One program per row, or several where rows are few: each then stores the state of its part (row_state.py), and a second
kernel merges them in the order of the parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.kernel_ops import ALWAYS, logprob_results
from . import launch
from .row_state import over_lanes, together, walk
from .scalar import LN_2
from .vocabulary import (
    IGNORED,
    aligned_rows,
    bent,
    factors,
    ids_per_row,
    in_packs,
    keep_arguments,
    load_own,
    lse_and_rest,
    part_to_sum,
    row_begin,
    row_scale,
    row_strides,
    vector,
)

OUTPUTS = (*ALWAYS, "log_sum_sq_probs", "mean_logit", "max_prob", "is_top1", "rank")
SUMS = tl.constexpr(5)  # floats in the scratch memory per part: m and four sums


@triton.jit
def _leave(scratch, counts, row, part, parts, K, slot, real, state, scale, KP: tl.constexpr, WANT: tl.constexpr):
    """Stores the state of a part; counts are added, integers, so that their order does not matter."""
    to = scratch + row * SUMS * parts + part
    m, total, weighted, squares = together(state[0], state[1], state[2], state[3], scale, WANT[0])
    tl.store(to, m)
    tl.store(to + parts, total)
    tl.store(to + 2 * parts, weighted)
    if WANT[0]:
        tl.store(to + 3 * parts, squares)
    if WANT[1]:
        tl.store(to + 4 * parts, tl.sum(state[4], 0))
    at = row * (1 + 2 * K)
    if WANT[2]:
        tl.atomic_add(counts + at, tl.sum(state[5], 0), sem="relaxed")
    if WANT[3]:
        tl.atomic_add(counts + at + 1 + slot, over_lanes(state[6], slot, KP), mask=real, sem="relaxed")
    if WANT[4]:
        tl.atomic_add(counts + at + 1 + K + slot, over_lanes(state[7], slot, KP), mask=real, sem="relaxed")


@triton.jit
def _store_row(
    out, row, at, real, used, known, y_own, scale, m, mass, weighted, squares, mean, kept, above, tied, T: tl.constexpr
):
    """Results of a row from its sums; y_own, above and tied are one per id."""
    log_mass = tl.log(mass)
    tl.store(out[0] + at, tl.where(used, (y_own - m) * scale - log_mass, 0.0), mask=real)
    tl.store(out[1] + row, log_mass - weighted / mass * LN_2)
    lse, rest = lse_and_rest(m * scale, mass)
    tl.store(out[2] + row, lse)
    tl.store(out[3] + row, rest)
    if out[4] is not None:
        tl.store(out[4] + row, tl.log(squares) - 2 * log_mass)
    if out[5] is not None:
        tl.store(out[5] + row, mean * scale / kept.to(T))
    if out[6] is not None:
        tl.store(out[6] + row, tl.where(mass > 0, 1 / mass, float("nan")))
    if out[7] is not None:
        tl.store(out[7] + at, (known & (above == 0) & (tied == 0)).to(tl.uint8), mask=real)
    if out[8] is not None:
        tl.store(out[8] + at, tl.where(known, above.to(tl.int64) + 1, 0), mask=real)


@triton.jit
def _store_zeros(out, row, at, real):
    for k in tl.static_range(9):
        if out[k] is not None:
            if k == 0 or k >= 7:
                tl.store(out[k] + at, 0, mask=real)
            else:
                tl.store(out[k] + row, 0)


@triton.jit
def _store_state(
    out, row, at, real, used, known, y_own, scale, state, slot, vocab, KP: tl.constexpr, WANT: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """The row whose state, over lanes, is complete."""
    kept = tl.sum(state[5], 0) if WANT[2] else vocab + tl.zeros((), tl.int32)
    above = over_lanes(state[6], slot, KP) if WANT[3] else tl.zeros((), tl.int32)
    tied = over_lanes(state[7], slot, KP) if WANT[4] else tl.zeros((), tl.int32)
    mean = tl.sum(state[4], 0) if WANT[1] else state[4]
    m, total, weighted, squares = together(state[0], state[1], state[2], state[3], scale, WANT[0])
    _store_row(
        out, row, at, real, used, known, y_own, scale, m, total, weighted, squares, mean, kept, above, tied, T
    )  # fmt: skip


@launch.kernel
def forward_kernel(
    logits, ids, temperatures, keep, out, scratch, counts, time, vocab, K, parts, stride_batch, stride_time,
    keep_batch, keep_time, scale: tl.float64, inner: tl.float64, KP: tl.constexpr, WANT: tl.constexpr,
    SOFTCAP: tl.constexpr, PLAIN: tl.constexpr, SPLIT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
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
        begin = in_packs(row_begin(row, time, stride_batch, stride_time), ALIGNED, VEC)
        keep_begin = in_packs(row_begin(row, time, keep_batch, keep_time), ALIGNED, VEC)
        factor, bend = row_scale(scale, temperatures, row, T), tl.full((), inner, T)
        known = (id >= 0) & (id < vocab)
        own, _ = load_own(logits, keep, begin, keep_begin, id, known, T)
        low, high = part_to_sum(begin, vocab, part, parts, BLOCK, SPLIT)
        state = walk(
            logits, keep, low, high, keep_begin - begin, own, begin + id, slot, K, factor, bend, KP, WANT, SOFTCAP,
            PLAIN, BLOCK // (LANES * VEC), LANES, VEC, T,
        )  # fmt: skip
        if SPLIT:
            _leave(scratch, counts, row, part, parts, K, slot, real, state, factor, KP, WANT)
        else:
            y_own = bent(own, bend, SOFTCAP)
            _store_state(out, row, at, real, used, known, y_own, factor, state, slot, vocab, KP, WANT, T)


@launch.kernel
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
        m = tl.load(here, mask=those, other=-float("inf"))
        total = tl.load(here + parts, mask=those, other=0.0)
        weighted = tl.load(here + 2 * parts, mask=those, other=0.0)
        squares, mean = tl.zeros((), T), tl.zeros((), T)
        if WANT[0]:
            squares = tl.load(here + 3 * parts, mask=those, other=0.0)
        if WANT[1]:
            mean = tl.sum(tl.load(here + 4 * parts, mask=those, other=0.0), 0)
        factor = row_scale(scale, temperatures, row, T)
        m, total, weighted, squares = together(m, total, weighted, squares, factor, WANT[0])
        counted = row * (1 + 2 * K)
        kept = tl.load(counts + counted) if WANT[2] else vocab + tl.zeros((), tl.int32)
        above = tl.load(counts + counted + 1 + slot, mask=real, other=0) if WANT[3] else tl.zeros((), tl.int32)
        tied = tl.load(counts + counted + 1 + K + slot, mask=real, other=0) if WANT[4] else tl.zeros((), tl.int32)
        known = (id >= 0) & (id < vocab)
        begin = row_begin(row, time, stride_batch, stride_time)
        own, _ = load_own(logits, keep, begin, row_begin(row, time, keep_batch, keep_time), id, known, T)
        y_own = bent(own, tl.full((), inner, T), SOFTCAP)
        _store_row(
            out, row, at, real, used, known, y_own, factor, m, total, weighted, squares, mean, kept, above, tied, T
        )  # fmt: skip


def token_logprobs(
    logits: Tensor, ids: Tensor, temperature: float, temperatures: Tensor | None, softcap: float, logit_scale: float,
    keep_mask: Tensor | None, outputs: list[str], inplace_backward: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results as tokenrl/ops/kernel_ops.py orders them; those neither in ALWAYS nor in outputs are empty."""
    results = logprob_results(logits, ids, outputs, torch.promote_types(logits.dtype, torch.float32))
    *_, time, vocab = logits.shape
    rows, per_row = logits.shape[:-1].numel(), ids_per_row(ids, logits)
    if rows == 0:
        return results
    wanted = [name in ALWAYS or name in outputs for name in OUTPUTS]
    out = tuple(_bytes(x) if want else None for x, want in zip(results, wanted, strict=True))
    squares, mean, _, top1, rank = wanted[len(ALWAYS) :]
    want = (squares, mean, mean and keep_mask is not None, top1 or rank, top1)
    scale, inner, capped = factors(temperature, softcap, logit_scale)
    parts = launch.vocab_parts(rows, vocab, logits.device)
    scratch = counts = None
    if parts > 1:
        scratch = results[1].new_empty(rows * SUMS.value * parts)
        counts = ids.new_zeros(rows * (1 + 2 * per_row), dtype=torch.int32) if any(want[2:]) else None
    heavy = capped or any(want)
    block, aligned = launch.vocab_block(vocab, logits.dtype, parts, heavy), aligned_rows(logits, keep_mask)
    warps = launch.vocab_warps(block, 8 if heavy else 32)
    if not aligned:  # narrow loads need an address each
        block = max(block // 2, 128)
    kept, *keep_strides = keep_arguments(keep_mask)
    common = (
        logits, ids, temperatures, kept, out, scratch, counts, time, vocab, per_row, parts, *row_strides(logits),
        *keep_strides, scale, inner,
    )  # fmt: skip
    how = {"KP": triton.next_power_of_2(per_row), "WANT": want, "SOFTCAP": capped}
    with launch.on_device_of(logits):
        forward_kernel[(rows * parts,)](
            *common, **how, PLAIN=not capped and not any(wanted[len(ALWAYS) :]), SPLIT=parts > 1, ALIGNED=aligned,
            BLOCK=block, LANES=min(32 * warps, block // vector(logits)), VEC=vector(logits), num_warps=warps,
            **launch.several_ids(per_row if top1 or rank else 1),
        )  # fmt: skip
        if parts > 1:
            merge_kernel[(rows,)](*common, **how, PARTS=triton.next_power_of_2(parts), num_warps=1)
    return results


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.bool else x
