"""State of a row of logits, or of a part of it, that token_logprobs takes over its blocks.

(m, total, weighted, squares, sum of y, kept, above, tied): y is a logit, under a softcap its tanh, and z = scale y; per
lane the maximum m of y, the sums of e^(z - scale m), of these times (z - scale m) / ln 2, of their squares, and of y;
how many logits are kept, are above each id's own, and are equal to it at a smaller index. What no output needs stays 0.

A block is [LANES, PACKS, VEC] logits: a lane is a thread that takes PACKS times 16 bytes at once, so that its maximum
moves once in all of them.
"""

import triton
import triton.language as tl

from .scalar import LOG2_E, exp2, fma
from .vocabulary import STAGES, bent, load_block

# Within it of 0 the powers 2^t at t = scale y - anchor, one fma, are of use: what rounding takes of such an anchor is
# in every t of a lane, below 1/16, and known.
FAR = tl.constexpr(1 << 20)
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
def lanes_of(PACKS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Where the logits of a block lie in it."""
    packs = tl.arange(0, LANES)[:, None, None] * VEC + tl.arange(0, PACKS)[None, :, None] * (LANES * VEC)
    return packs + tl.arange(0, VEC)[None, None, :]


@triton.jit
def _highest(y):
    return tl.max(tl.max(y, 2), 1)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 2), 1)


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
    m, mean = tl.maximum(state[0], _highest(y)), state[4]
    moved = distance(state[0], m, scale)
    total, weighted, squares = rescaled(state[1], state[2], state[3], moved, WANT[0])
    t = distance(y, m[:, None, None], scale)
    e = exp2(t)
    total += _sum(e)
    weighted += _sum(e * t)
    if WANT[0]:
        squares += _sum(e * e)
    if WANT[1]:
        mean += _sum(tl.where(counted, y, 0.0))
    return m, total, weighted, squares, mean


@triton.jit
def _anchor(m, scale):
    return tl.maximum(m * scale, -FAR)


@triton.jit
def _powers(state, y, scale):
    """(m, total, weighted) with one more block, the sums relative to the anchor of m. scale: over ln 2."""
    m = tl.maximum(state[0], _highest(y))
    anchor = _anchor(m, scale)
    moved = _anchor(state[0], scale) - anchor
    total, weighted, _ = rescaled(state[1], state[2], 0.0, moved, False)
    t = fma(y, scale, -anchor[:, None, None])
    e = exp2(t)
    return m, total + _sum(e), weighted + _sum(e * tl.maximum(t, -160.0))  # finite, as 0 times -inf is NaN


@triton.jit
def _from_anchor(state, scale):
    """(m, total, weighted) relative to m. The largest logit itself is 1 of the sum and 0 of the other, exactly: of a
    sure row the entropy is 0, not below."""
    rest = fma(state[0], scale, -_anchor(state[0], scale))
    peak, some = exp2(rest), state[0] > -float("inf")
    total = tl.where(some, 1 + (state[1] - peak) / peak, state[1])
    weighted = tl.minimum((state[2] - state[1] * rest) / peak, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return state[0], total, tl.where(some, weighted, state[2])


@triton.jit
def _are_known(m, scale):
    """Whether the powers of no lane are too far from 0."""
    near = (m == -float("inf")) | (tl.abs(m * scale) < FAR)
    return (tl.min(near.to(tl.int32), 0) > 0) & (scale > 1e-30) & (scale < 1e30)


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
    return _sum(hits.to(tl.int32))


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
        kept += _sum(counted.to(tl.int32))
    if WANT[3]:
        above = _order(above, x, own, before, lanes, inside, slot, K, KP, False)
    if WANT[4]:
        tied = _order(tied, x, own, before, lanes, inside, slot, K, KP, True)
    m, total, weighted, squares, mean = _moments(state, bent(x, inner, SOFTCAP), counted, scale, WANT)
    return m, total, weighted, squares, mean, kept, above, tied


@triton.jit
def _walk(
    logits, keep, low, high, keep_lag, own, own_at, slot, K, scale, inner, KP: tl.constexpr, WANT: tl.constexpr,
    SOFTCAP: tl.constexpr, PACKS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The state of the logits from low to high."""
    BLOCK: tl.constexpr = PACKS * LANES * VEC
    lanes, state = lanes_of(PACKS, LANES, VEC), empty(LANES, KP, WANT, T)
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
def _walk_powers(
    logits, keep, low, high, keep_lag, scale, PACKS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """(m, total, weighted, whether they are known) of the logits from low to high."""
    BLOCK: tl.constexpr = PACKS * LANES * VEC
    lanes, none, scale = lanes_of(PACKS, LANES, VEC), tl.zeros((LANES,), T), scale * LOG2_E
    state = (tl.full((LANES,), -float("inf"), T), none, none)
    whole = (tl.maximum(high - low, 0) // BLOCK * BLOCK).to(tl.int32)
    for offset in tl.range(0, whole, BLOCK, num_stages=STAGES):
        x, _ = load_block(logits, keep, low + offset + lanes, keep_lag, None, T)
        state = _powers(state, x, scale)
    stop = low + whole
    if stop < high:
        x, _ = load_block(logits, keep, stop + lanes, keep_lag, stop + lanes < high, T)
        state = _powers(state, x, scale)
    m, total, weighted = _from_anchor(state, scale)
    return m, total, weighted, _are_known(m, scale)


@triton.jit
def walk(
    logits, keep, low, high, keep_lag, own, own_at, slot, K, scale, inner, KP: tl.constexpr, WANT: tl.constexpr,
    SOFTCAP: tl.constexpr, PLAIN: tl.constexpr, PACKS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """The state of the logits from low to high. Where nothing but the softmax is asked for it is made of powers of two,
    and of the rows of which these are not known once more."""
    if not PLAIN:
        return _walk(
            logits, keep, low, high, keep_lag, own, own_at, slot, K, scale, inner, KP, WANT, SOFTCAP, PACKS, LANES, VEC,
            T,
        )  # fmt: skip
    else:
        m, total, weighted, known = _walk_powers(logits, keep, low, high, keep_lag, scale, PACKS, LANES, VEC, T)
        if not known:
            state = _walk(
                logits, keep, low, high, keep_lag, own, own_at, slot, K, scale, inner, KP, WANT, SOFTCAP, PACKS, LANES,
                VEC, T,
            )  # fmt: skip
            m, total, weighted = state[0], state[1], state[2]
        none, nothing = tl.zeros((), T), tl.zeros((), tl.int32)
        return m, total, weighted, none, none, nothing, nothing, nothing


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
