"""Where sequences, segments and valid tokens lie; sums, minima and copies along them, one block of tokens at a time.

A program walks its sequence in blocks; what crosses a block's border is a carry. `reset` marks the tokens at which a
new span begins in the direction of the walk; it is looked at only where there are segments.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .scalar import clip, smaller


class Spans(NamedTuple):
    """Kernel argument: boundaries int64 [S + 1], clamped to [0, N] when read; mask and starts bool [N] or None."""

    cu_seqlens: Tensor
    mask: Tensor | None
    starts: Tensor | None
    num_tokens: int
    num_sequences: int


@triton.jit
def sequence(spans, i):
    """First token of sequence i and the one after its last, int64."""
    begin = tl.maximum(tl.minimum(tl.load(spans.cu_seqlens + i), spans.num_tokens), 0)
    end = tl.maximum(tl.minimum(tl.load(spans.cu_seqlens + i + 1), spans.num_tokens), 0)
    return begin, end


@triton.jit
def valid_tokens(spans, at, inside):
    """Which of the tokens `at` take part; `inside` says which of them exist."""
    if spans.mask is None:
        return inside
    else:
        return inside & (tl.load(spans.mask + at, mask=inside, other=0) != 0)


@triton.jit
def segment_starts(spans, at, inside):
    """Where a segment starts at a valid token."""
    if spans.starts is None:
        return at < 0
    else:
        return valid_tokens(spans, at, inside) & (tl.load(spans.starts + at, mask=inside, other=0) != 0)


@triton.jit
def segment_ends(spans, at, end):
    """Where the next token begins another segment or none is left."""
    if spans.starts is None:
        return at == end - 1
    else:
        return segment_starts(spans, at + 1, at + 1 < end) | (at == end - 1)


@triton.jit
def fill_outside(spans, i, begin, end, out, BLOCK: tl.constexpr):
    """Zeros before the first sequence and after the last one."""
    if i == 0:
        for first in range(0, begin, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(out + at, tl.zeros((BLOCK,), out.dtype.element_ty), mask=at < begin)
    if i == spans.num_sequences - 1:
        for first in range(end, spans.num_tokens, BLOCK):
            at = first + tl.arange(0, BLOCK)
            tl.store(out + at, tl.zeros((BLOCK,), out.dtype.element_ty), mask=at < spans.num_tokens)


@triton.jit
def hull(spans, begin, end, BLOCK: tl.constexpr):
    """begin and end of the tokens from the first valid one to the last: whatever padding there is, each falls into the
    same lane of a block."""
    if spans.mask is None:
        return begin, end
    else:
        lanes = tl.arange(0, BLOCK)
        firsts, lasts = lanes * 0 + end, lanes * 0 + begin
        for block in range(begin, end, BLOCK):
            at = block + lanes
            valid = valid_tokens(spans, at, at < end)
            firsts, lasts = (
                tl.minimum(firsts, tl.where(valid, at, end)),
                tl.maximum(lasts, tl.where(valid, at + 1, begin)),
            )
        first = tl.min(firsts, 0)
        return first, tl.maximum(tl.max(lasts, 0), first)


@triton.jit
def without_padding(spans, begin, end, out, BLOCK: tl.constexpr):
    """The same, and zeros around them."""
    if spans.mask is None:
        return begin, end
    else:
        lanes = tl.arange(0, BLOCK)
        first, last = hull(spans, begin, end, BLOCK)
        for block in range(begin, first, BLOCK):
            tl.store(out + block + lanes, tl.zeros((BLOCK,), out.dtype.element_ty), mask=block + lanes < first)
        for block in range(last, end, BLOCK):
            tl.store(out + block + lanes, tl.zeros((BLOCK,), out.dtype.element_ty), mask=block + lanes < end)
        return first, last


@triton.jit
def is_last(ticket):
    """Whether all other programs have come here, so that what they stored before is seen. Leaves the ticket at 0."""
    tl.debug_barrier()  # all threads' stores come before the ticket
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def log_ratios(logp, old_logp, at, valid, clamp):
    """logp; x = logp - old_logp (None: 0) clamped to +-clamp (None: not); where the clamp does not bind. Masked: 0."""
    own = tl.load(logp + at, mask=valid, other=0.0)
    x = own
    if old_logp is not None:
        x = own - tl.load(old_logp + at, mask=valid, other=0.0)
    if clamp is None:
        return own, x, valid
    else:
        clamped = clip(x, -clamp, clamp)
        return own, clamped, clamped == x


@triton.jit
def parameter(number, tensor, at, valid, T: tl.constexpr):
    """A gate parameter in a block: a number, or one value per token (1 in masked cells)."""
    if tensor is None:
        return tl.full((), number, T)
    else:
        return tl.load(tensor + at, mask=valid, other=1.0)


@triton.jit
def _add(reset_a, a, reset_b, b):
    return reset_a | reset_b, tl.where(reset_b != 0, b, a + b)


@triton.jit
def _least(reset_a, a, reset_b, b):
    return reset_a | reset_b, tl.where(reset_b != 0, b, smaller(a, b))


@triton.jit
def _first(reset_a, a, reset_b, b):
    return reset_a | reset_b, tl.where(reset_b != 0, b, a)


@triton.jit
def _at_exit(x, REVERSE: tl.constexpr):
    """The entry of a block that a walk passes last."""
    exit: tl.constexpr = 0 if REVERSE else x.shape[0] - 1
    return tl.sum(tl.where(tl.arange(0, x.shape[0]) == exit, x, tl.zeros_like(x)), 0)


@triton.jit
def running_sum(spans, x, reset, carry, REVERSE: tl.constexpr):
    """Inclusive sums, and the carry into the next block."""
    if spans.starts is None:
        sums = tl.cumsum(x, 0, reverse=REVERSE) + carry
        return sums, _at_exit(sums, REVERSE)
    else:
        seen, sums = tl.associative_scan((reset.to(tl.int32), x), 0, _add, reverse=REVERSE)
        sums = tl.where(seen != 0, sums, sums + carry)
        return sums, _at_exit(sums, REVERSE)


@triton.jit
def running_min(spans, x, reset, carry):
    """Inclusive minima, and the carry into the next block."""
    if spans.starts is None:
        lowest = smaller(tl.associative_scan(x, 0, smaller), carry)
    else:
        seen, lowest = tl.associative_scan((reset.to(tl.int32), x), 0, _least)
        lowest = tl.where(seen != 0, lowest, smaller(lowest, carry))
    return lowest, _at_exit(lowest, False)


@triton.jit
def spread(x, reset, carry, REVERSE: tl.constexpr):
    """Each token gets the x of the last `reset` token that the walk has passed; and the carry into the next block."""
    seen, copied = tl.associative_scan((reset.to(tl.int32), x), 0, _first, reverse=REVERSE)
    copied = tl.where(seen != 0, copied, carry)
    return copied, _at_exit(copied, REVERSE)


@triton.jit
def exclusive_minima(spans, logp, old_logp, clamp, at, begin, end, reset, carry):
    """The least log ratio of the valid tokens before each token in its span, inf where there are none; the carry."""
    before = valid_tokens(spans, at - 1, (at > begin) & (at <= end))
    if spans.starts is not None:
        before = before & (reset == 0)
    _, x, _ = log_ratios(logp, old_logp, at - 1, before, clamp)
    return running_min(spans, tl.where(before, x, float("inf")), reset, carry)
