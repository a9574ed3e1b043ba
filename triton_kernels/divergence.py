"""Op divergence: two heads' rows of logits side by side.

value = sum_v f(log p_v, log r_v),   by_p = sum_v p_v df/dp_v,   by_r = sum_v r_v df/dr_v

A kind that weighs logs is summed in one sweep with the lse of both heads; the others need these first. One program per
row, or several where rows are few: each then stores what its part has, and a second kernel merges that in the order of
the parts.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..ops.divergence_ops import divergence_results
from . import launch
from .divergences import WEIGHT
from .pair_row import Call, Strides, call_of, diverged, load_z, log_prob, lse_of, row_of
from .vocabulary import STAGES, lanes_of, lse_and_rest, part_to_sum

SWEPT = tl.constexpr(5)  # numbers per part that a sweep leaves


@triton.jit
def _shifted(value, weights, scale, log_p, log_r, KIND: tl.constexpr):
    """The sum of a kind's values of weights whose logarithms shift by log_p and log_r: by scale the weights that it
    sums, of the sum `weights`. What no longer has a weight is selected away."""
    one = tl.full((), 1, scale.dtype)
    of_one, _, _ = KIND(log_p, log_r, one, one)
    moved = value + tl.where(weights == 0, 0.0, weights * of_one)
    return tl.where(scale > 0, moved * scale, 0.0)


@triton.jit
def _raised(state, m_p, m_r, KIND: tl.constexpr, WEIGHT: tl.constexpr):
    """The sums relative to other, not smaller maxima: (of e^(z - m) of both heads, of a kind's value of these weights
    in the place of p and r). Until there is a finite maximum 0 stands in for it."""
    by_p = tl.where(state[0] == -float("inf"), 0.0, state[0] - m_p)
    by_r = tl.where(state[1] == -float("inf"), 0.0, state[1] - m_r)
    scale_p, scale_r = tl.exp(by_p), tl.exp(by_r)
    value = state[4]
    if WEIGHT == "p":
        value = _shifted(value, state[2], scale_p, by_p, by_r, KIND)
    elif WEIGHT == "r":
        value = _shifted(value, state[3], scale_r, by_p, by_r, KIND)
    return state[2] * scale_p, state[3] * scale_r, value


@triton.jit
def _finite(m):
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def _sweep_block(state, heads, of, at, inside, KIND: tl.constexpr, WEIGHT: tl.constexpr, SOFTCAP: tl.constexpr):
    z, _ = load_z(heads[0], of[0], of[0].begin + at, inside, SOFTCAP[0])
    other_z, _ = load_z(heads[1], of[1], of[1].begin + at, inside, SOFTCAP[1])
    highest_p = tl.maximum(state[0], tl.max(tl.max(z, 1), 0))
    highest_r = tl.maximum(state[1], tl.max(tl.max(other_z, 1), 0))
    m_p, m_r = _finite(highest_p), _finite(highest_r)
    sum_p, sum_r, value = _raised(state, m_p, m_r, KIND, WEIGHT)
    log_p, log_r = z - m_p, other_z - m_r
    p, r = tl.exp(log_p), tl.exp(log_r)
    if WEIGHT is not None:
        more, _, _ = KIND(log_p, log_r, p, r)
        value += tl.sum(more, 1)
    return highest_p, highest_r, sum_p + tl.sum(p, 1), sum_r + tl.sum(r, 1), value


@triton.jit
def _store_sums(out, row, odd, value, by_p, by_r):
    """odd: NaN where the row has no distribution, else 0."""
    tl.store(out[0] + row, value + odd)
    tl.store(out[1] + row, by_p + odd)
    tl.store(out[2] + row, by_r + odd)


@triton.jit
def _store_zeros(out, statistics, row, rows):
    for k in tl.static_range(3):
        tl.store(out[k] + row, 0)
    for k in tl.static_range(4):
        tl.store(statistics + k * rows + row, 0)


@triton.jit
def _store_swept(out, statistics, row, rows, m_p, m_r, sum_p, sum_r, value, KIND: tl.constexpr, WEIGHT: tl.constexpr):
    """lse and lse_rest of both heads' rows and, of a kind that weighs logs, its sums: those of one entry of its
    value."""
    lse, rest = lse_and_rest(m_p, sum_p)
    other_lse, other_rest = lse_and_rest(m_r, sum_r)
    tl.store(statistics + row, lse)
    tl.store(statistics + rows + row, rest)
    tl.store(statistics + 2 * rows + row, other_lse)
    tl.store(statistics + 3 * rows + row, other_rest)
    if WEIGHT is not None:
        one, zero = tl.full((), 1, value.dtype), tl.zeros((), value.dtype)
        weights = sum_p if WEIGHT == "p" else sum_r
        whole = _shifted(value, weights, 1 / weights, -tl.log(sum_p), -tl.log(sum_r), KIND)
        if WEIGHT == "p":
            whole, by_p, by_r = KIND(zero, -whole, one, one)
        else:
            whole, by_p, by_r = KIND(-whole, zero, one, one)
        _store_sums(out, row, (lse - lse) + (other_lse - other_lse), whole, by_p, by_r)


@launch.kernel
def sweep_kernel(
    heads, stride_batch, stride_time, keep_batch, keep_time, other_batch, other_time, other_keep_batch,
    other_keep_time, counted, out, statistics, scratch, rows, vocab, time, parts, scale: tl.float64, inner: tl.float64,
    other_scale: tl.float64, other_inner: tl.float64, KIND: tl.constexpr, WEIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The lse of both rows and the sums of a kind that weighs logs, or what a part of the rows has of them."""
    T: tl.constexpr = statistics.dtype.element_ty
    row, part = tl.program_id(0).to(tl.int64), 0
    if SPLIT:
        part = row % parts
        row = row // parts
    counts = True
    if counted is not None:
        counts = tl.load(counted + row) != 0
    if counts:
        strides = Strides(stride_batch, stride_time, keep_batch, keep_time)
        other_strides = Strides(other_batch, other_time, other_keep_batch, other_keep_time)
        of = (
            row_of(heads[0], strides, row, time, scale, inner, ALIGNED[0], VEC, T),
            row_of(heads[1], other_strides, row, time, other_scale, other_inner, ALIGNED[1], VEC, T),
        )
        none, least = tl.zeros((BLOCK // VEC,), T), tl.full((), -float("inf"), T)
        state, lanes = (least, least, none, none, none), lanes_of(BLOCK, VEC)
        low, high = part_to_sum(0, vocab, part, parts, BLOCK, SPLIT)
        stop = low + tl.maximum(high - low, 0) // BLOCK * BLOCK
        for block in tl.range(low, stop, BLOCK, num_stages=STAGES):
            state = _sweep_block(state, heads, of, block + lanes, None, KIND, WEIGHT, SOFTCAP)
        if stop < high:
            at = stop + lanes
            state = _sweep_block(state, heads, of, at, at < high, KIND, WEIGHT, SOFTCAP)
        m_p, m_r, sum_p, sum_r, value = (
            state[0],
            state[1],
            tl.sum(state[2], 0),
            tl.sum(state[3], 0),
            tl.sum(state[4], 0),
        )
        if SPLIT:
            to = scratch + row * SWEPT * parts + part
            tl.store(to, m_p)
            tl.store(to + parts, m_r)
            tl.store(to + 2 * parts, sum_p)
            tl.store(to + 3 * parts, sum_r)
            tl.store(to + 4 * parts, value)
        else:
            _store_swept(out, statistics, row, rows, m_p, m_r, sum_p, sum_r, value, KIND, WEIGHT)
    elif not SPLIT:
        _store_zeros(out, statistics, row, rows)


@launch.kernel
def sweep_merge_kernel(
    counted, out, statistics, scratch, rows, parts, KIND: tl.constexpr, WEIGHT: tl.constexpr, PARTS: tl.constexpr
):
    """The results of a row from what its parts have."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    counts = True
    if counted is not None:
        counts = tl.load(counted + row) != 0
    if counts:
        here, those = scratch + row * SWEPT * parts + part, part < parts
        of_p = tl.load(here, mask=those, other=-float("inf"))
        of_r = tl.load(here + parts, mask=those, other=-float("inf"))
        sum_p = tl.load(here + 2 * parts, mask=those, other=0.0)
        sum_r = tl.load(here + 3 * parts, mask=those, other=0.0)
        value = tl.load(here + 4 * parts, mask=those, other=0.0)
        m_p, m_r = tl.max(of_p, 0), tl.max(of_r, 0)
        state = (of_p, of_r, sum_p, sum_r, value)
        sum_p, sum_r, value = _raised(state, _finite(m_p), _finite(m_r), KIND, WEIGHT)
        _store_swept(
            out, statistics, row, rows, m_p, m_r, tl.sum(sum_p, 0), tl.sum(sum_r, 0), tl.sum(value, 0), KIND, WEIGHT
        )
    else:
        _store_zeros(out, statistics, row, rows)


@triton.jit
def _add_block(
    sums, heads, of, lse, at, inside, params, KIND: tl.constexpr, NUM_PARAMS: tl.constexpr, SOFTCAP: tl.constexpr
):
    z, _ = load_z(heads[0], of[0], of[0].begin + at, inside, SOFTCAP[0])
    other_z, _ = load_z(heads[1], of[1], of[1].begin + at, inside, SOFTCAP[1])
    log_p, p = log_prob(z, lse[0])
    log_r, r = log_prob(other_z, lse[1])
    value, by_p, by_r = diverged(log_p, log_r, p, r, params, KIND, NUM_PARAMS)
    return sums[0] + tl.sum(value, 1), sums[1] + tl.sum(by_p, 1), sums[2] + tl.sum(by_r, 1)


@launch.kernel
def divergence_kernel(
    heads, stride_batch, stride_time, keep_batch, keep_time, other_batch, other_time, other_keep_batch,
    other_keep_time, counted, out, statistics, rows, vocab, time, parts, scale: tl.float64, inner: tl.float64,
    other_scale: tl.float64, other_inner: tl.float64, first: tl.float64, second: tl.float64, KIND: tl.constexpr,
    NUM_PARAMS: tl.constexpr, SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """The three sums of a row, or of a part of it, from both rows' lse."""
    T: tl.constexpr = statistics.dtype.element_ty
    row, part = tl.program_id(0).to(tl.int64), 0
    if SPLIT:
        part = row % parts
        row = row // parts
    counts = True
    if counted is not None:
        counts = tl.load(counted + row) != 0
    none = tl.zeros((BLOCK // VEC,), T)
    sums, odd = (none, none, none), tl.zeros((), T)
    if counts:
        params = tl.full((), first, T), tl.full((), second, T)
        strides = Strides(stride_batch, stride_time, keep_batch, keep_time)
        other_strides = Strides(other_batch, other_time, other_keep_batch, other_keep_time)
        of = (
            row_of(heads[0], strides, row, time, scale, inner, ALIGNED[0], VEC, T),
            row_of(heads[1], other_strides, row, time, other_scale, other_inner, ALIGNED[1], VEC, T),
        )
        lse, lanes = (lse_of(statistics, row, rows, 0), lse_of(statistics, row, rows, 1)), lanes_of(BLOCK, VEC)
        low, high = part_to_sum(0, vocab, part, parts, BLOCK, SPLIT)
        stop = low + tl.maximum(high - low, 0) // BLOCK * BLOCK
        for block in tl.range(low, stop, BLOCK, num_stages=STAGES):
            sums = _add_block(sums, heads, of, lse, block + lanes, None, params, KIND, NUM_PARAMS, SOFTCAP)
        if stop < high:
            at = stop + lanes
            sums = _add_block(sums, heads, of, lse, at, at < high, params, KIND, NUM_PARAMS, SOFTCAP)
        # Where a row has no distribution its lse is no number.
        odd = (lse[0].rounded - lse[0].rounded) + (lse[1].rounded - lse[1].rounded)
    _store_sums(out, tl.program_id(0), odd, tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0))


@launch.kernel
def divergence_merge_kernel(of_parts, out, parts, PARTS: tl.constexpr):
    """The sums of a row from those of its parts."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    for k in tl.static_range(3):
        found = tl.load(of_parts[k] + row * parts + part, mask=part < parts, other=0.0)
        tl.store(out[k] + row, tl.sum(found, 0))


def _sweep(call: Call, out: tuple[Tensor, ...], statistics: Tensor, kind: dict) -> None:
    rows, parts = out[0].numel(), call.sizes[-1]
    scratch = statistics.new_empty(rows * SWEPT.value * parts) if parts > 1 else None
    sweep_kernel[(rows * parts,)](
        call.heads, *call.strides, call.counted, out, statistics, scratch, rows, *call.sizes, *call.scales, **kind,
        **call.launch,
    )  # fmt: skip
    if parts > 1:
        sweep_merge_kernel[(rows,)](
            call.counted, out, statistics, scratch, rows, parts, **kind, PARTS=triton.next_power_of_2(parts),
            num_warps=1,
        )  # fmt: skip


def _sum(call: Call, out: tuple[Tensor, ...], statistics: Tensor) -> None:
    rows, parts = out[0].numel(), call.sizes[-1]
    sums = out if parts == 1 else tuple(x.new_empty(rows * parts) for x in out)
    divergence_kernel[(rows * parts,)](
        call.heads, *call.strides, call.counted, sums, statistics, rows, *call.sizes, *call.scales, *call.params,
        **call.kind, **call.launch,
    )  # fmt: skip
    if parts > 1:
        divergence_merge_kernel[(rows,)](sums, out, parts, PARTS=triton.next_power_of_2(parts), num_warps=1)


def divergence(
    logits: Tensor, other_logits: Tensor, statistics: Tensor | None, *given
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(the divergence, by_p, by_r of each row, 0 where rows is false; the statistics, made or as they are given)."""
    *out, found = divergence_results(logits)
    if statistics is not None:
        found.copy_(statistics)
    if out[0].numel():
        call, weight = call_of(logits, other_logits, given), WEIGHT.get(given[-2])
        with launch.on_device_of(logits):
            if weight is not None or statistics is None:
                # What no kind asks about compiles once for all that have no weight.
                kind = {"KIND": call.kind["KIND"] if weight is not None else None, "WEIGHT": weight}
                _sweep(call, tuple(out), found, kind)
            if weight is None:
                _sum(call, tuple(out), found)
    return *out, found
