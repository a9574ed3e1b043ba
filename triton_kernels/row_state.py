"""State of a row of logits, or of a part of it, that token_logprobs takes over its blocks.

(m, total, weighted, squares, sum of y, kept, above, tied): y is a logit, under a softcap its tanh, and z = scale y; per
lane the maximum m of y, the sums of e^(z - scale m), of these times (z - scale m) / ln 2, of their squares, and of y;
how many logits are kept, are above each id's own, and are equal to it at a smaller index. What no output needs stays 0.
"""

import triton
import triton.language as tl

from .scalar import LOG2_E, exp2
from .vocabulary import STAGES, bent, lanes_of, load_block

UNROLLED = tl.constexpr(8)  # ids of a row whose counts stay in registers: a loop over ids in that over blocks is slow


@triton.jit
def _no_counts(ROWS: tl.constexpr, KP: tl.constexpr):
    """Of a few ids one counter per lane each, in registers, and of many one per id."""
    counts = (tl.zeros((ROWS if KP <= UNROLLED else KP,), tl.int32),)
    for _ in tl.static_range(1, KP if KP <= UNROLLED else 1):
        counts = counts + (tl.zeros((ROWS,), tl.int32),)
    return counts


@triton.jit
def empty(ROWS: tl.constexpr, KP: tl.constexpr, WANT: tl.constexpr, T: tl.constexpr):
    """State before the first block; WANT says which of squares, mean, kept, above and tied are wanted."""
    none, counts = tl.zeros((ROWS,), T), _no_counts(ROWS, KP)
    zero, nothing = tl.zeros((), T), tl.zeros((), tl.int32)
    return (
        tl.full((ROWS,), -float("inf"), T), none, none, none if WANT[0] else zero, none if WANT[1] else zero,
        tl.zeros((ROWS,), tl.int32) if WANT[2] else nothing, counts if WANT[3] else nothing,
        counts if WANT[4] else nothing,
    )  # fmt: skip


@triton.jit
def distance(y, m, scale):
    """(z - scale m) / ln 2 for m at least y, held finite, as 0 times -inf is NaN. Before a finite logit is seen m is
    -inf, and 0 stands in for it."""
    shift = tl.where(m == -float("inf"), 0.0, m)
    return tl.maximum((y - shift) * (scale * LOG2_E), -1e4, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rescaled(total, weighted, squares, moved, SQUARES: tl.constexpr):
    """The sums relative to another maximum, `moved` from their own."""
    factor = exp2(moved)
    weighted = (weighted + moved * total) * factor
    return total * factor, weighted, squares * (factor * factor) if SQUARES else squares


@triton.jit
def _moments(state, y, counted, scale, WANT: tl.constexpr):
    """(m, total, weighted, squares, sum of y) with one more block: the exponential is taken once per logit, and no
    lane waits for another."""
    m, mean = tl.maximum(state[0], tl.max(y, 1)), state[4]
    moved = distance(state[0], m, scale)
    total, weighted, squares = rescaled(state[1], state[2], state[3], moved, WANT[0])
    t = distance(y, m[:, None], scale)
    e = exp2(t)
    total += tl.sum(e, 1)
    weighted += tl.sum(e * t, 1)
    if WANT[0]:
        squares += tl.sum(e * e, 1)
    if WANT[1]:
        mean += tl.sum(tl.where(counted, y, 0.0), 1)
    return m, total, weighted, squares, mean


@triton.jit
def together(m, total, weighted, squares, scale, SQUARES: tl.constexpr):
    """(m, total, weighted, squares) of all lanes, or parts, as one."""
    highest = tl.max(m, 0)
    total, weighted, squares = rescaled(total, weighted, squares, distance(m, highest, scale), SQUARES)
    return highest, tl.sum(total, 0), tl.sum(weighted, 0), tl.sum(squares, 0) if SQUARES else squares


@triton.jit
def _count(k, x, own, before, lanes, inside, slot, TIES: tl.constexpr):
    """How many of a block, per lane: above the logit of id k, or equal to it in the lanes `before`."""
    own_k = tl.sum(tl.where(slot == k, own, 0.0), 0)
    if TIES:
        hits = (x == own_k) & (lanes < tl.sum(tl.where(slot == k, before, 0), 0))
        if inside is not None:
            hits = hits & inside
    else:
        hits = x > own_k
    return tl.sum(hits.to(tl.int32), 1)


@triton.jit
def _order(counts, x, own, before, lanes, inside, slot, K, KP: tl.constexpr, TIES: tl.constexpr):
    if KP <= UNROLLED:
        more = (counts[0] + _count(0, x, own, before, lanes, inside, slot, TIES),)
        for k in tl.static_range(1, KP):
            more = more + (counts[k] + _count(k, x, own, before, lanes, inside, slot, TIES),)
        return more
    else:
        total = counts[0]
        for k in range(K):
            total += tl.where(slot == k, tl.sum(_count(k, x, own, before, lanes, inside, slot, TIES), 0), 0)
        return (total,)


@triton.jit
def _block(
    state, logits, keep, block, lanes, inside, keep_lag, own, own_at, slot, K, scale, inner, KP: tl.constexpr,
    WANT: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    x, counted = load_block(logits, keep, block + lanes, keep_lag, inside, T)
    kept, above, tied = state[5], state[6], state[7]
    before = (own_at - block).to(tl.int32)
    if WANT[2]:
        kept += tl.sum(counted.to(tl.int32), 1)
    if WANT[3]:
        above = _order(above, x, own, before, lanes, inside, slot, K, KP, False)
    if WANT[4]:
        tied = _order(tied, x, own, before, lanes, inside, slot, K, KP, True)
    m, total, weighted, squares, mean = _moments(state, bent(x, inner, SOFTCAP), counted, scale, WANT)
    return m, total, weighted, squares, mean, kept, above, tied


@triton.jit
def walk(
    state, logits, keep, low, high, keep_lag, own, own_at, slot, K, scale, inner, KP: tl.constexpr, WANT: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The state with the logits from low to high."""
    lanes = lanes_of(BLOCK, VEC)
    whole = (tl.maximum(high - low, 0) // BLOCK * BLOCK).to(tl.int32)
    for offset in tl.range(0, whole, BLOCK, num_stages=STAGES):
        state = _block(
            state, logits, keep, low + offset, lanes, None, keep_lag, own, own_at, slot, K, scale, inner, KP, WANT,
            SOFTCAP, T,
        )  # fmt: skip
    stop = low + whole
    if stop < high:
        state = _block(
            state, logits, keep, stop, lanes, stop + lanes < high, keep_lag, own, own_at, slot, K, scale, inner,
            KP, WANT, SOFTCAP, T,
        )  # fmt: skip
    return state


@triton.jit
def over_lanes(counts, slot, KP: tl.constexpr):
    """Counts [KP]."""
    if KP <= UNROLLED:
        total = tl.zeros((KP,), tl.int32)
        for k in tl.static_range(KP):
            total += tl.where(slot == k, tl.sum(counts[k], 0), 0)
        return total
    else:
        return counts[0]
