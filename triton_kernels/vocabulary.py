"""What the kernels over rows of logits share: where rows and their parts lie, how they are read, and z of a logit.

A row is walked in blocks of [BLOCK / VEC, VEC] logits, VEC of them 16 bytes, so that a sum over VEC stays in a thread.
What is summed goes in blocks from the row's own start: its bits are the same in whatever place of a buffer it lies.
Where 16 bytes do not divide the rows' distance, that costs narrow loads. A gradient, of which nothing is summed, is
written in blocks that begin at multiples of VEC of its buffer: there only a row's first and last block pay for them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scalar import tanh

IGNORED = tl.constexpr(-100)
STAGES = tl.constexpr(3)  # blocks on their way from memory while one is worked on


@triton.jit
def row_begin(row, time, stride_batch, stride_time):
    return (row // time) * stride_batch + (row % time) * stride_time


@triton.jit
def in_packs(distance, ALIGNED: tl.constexpr, VEC: tl.constexpr):
    """As it is: of what is ALIGNED the compiler now knows that it is a multiple of VEC."""
    return distance // VEC * VEC if ALIGNED else distance


@triton.jit
def lanes_of(BLOCK: tl.constexpr, VEC: tl.constexpr):
    return tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def part_to_sum(begin, vocab, part, parts, BLOCK: tl.constexpr, SPLIT: tl.constexpr):
    """The stretch [low, high) of a row that begins at `begin`, in whole blocks from there; high <= low if empty."""
    if SPLIT:
        size = tl.cdiv(tl.cdiv(vocab, BLOCK), parts) * BLOCK
        return begin + part * size, tl.minimum(begin + vocab, begin + (part + 1) * size)
    else:
        return begin, begin + vocab


@triton.jit
def part_of(begin, vocab, part, parts, BLOCK: tl.constexpr, VEC: tl.constexpr, SPLIT: tl.constexpr):
    """The stretch [low, high) of a row that begins at `begin`: whole blocks, except where the row begins and ends."""
    low, high = begin, begin + vocab
    if SPLIT:
        first = begin // VEC * VEC
        size = tl.cdiv(tl.cdiv(high - first, BLOCK), parts) * BLOCK
        low = tl.maximum(begin, first + part * size)
        high = tl.minimum(high, first + (part + 1) * size)
    return low, high


@triton.jit
def blocks_of(low, high, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """(first, start, stop): whole blocks from start to stop; a head at first if first < low, a tail if stop < high."""
    first = low // VEC * VEC
    start = (first + tl.where(first < low, BLOCK, 0)) // VEC * VEC
    stop = start + BLOCK * (tl.maximum(high - start, 0) // BLOCK)
    return first, start, stop


@triton.jit
def load_block(logits, keep, at, keep_lag, inside, T: tl.constexpr):
    """(logits, which of them count): those outside the row or its keep mask are -inf."""
    x = tl.load(logits + at) if inside is None else tl.load(logits + at, mask=inside, other=-float("inf"))
    x = x.to(T)
    if keep is None:
        return x, tl.full((), 1, tl.int1) if inside is None else inside
    else:
        at_keep = at + keep_lag
        flags = tl.load(keep + at_keep) if inside is None else tl.load(keep + at_keep, mask=inside, other=0)
        kept = flags != 0
        return tl.where(kept, x, -float("inf")), kept


@triton.jit
def load_own(logits, keep, begin, keep_begin, ids, inside, T: tl.constexpr):
    """(logits of the ids, whether they are kept): -inf where they are not, nan for ids that are not inside."""
    x = tl.load(logits + begin + ids, mask=inside, other=float("nan")).to(T)
    if keep is None:
        return x, inside
    else:
        kept = tl.load(keep + keep_begin + ids, mask=inside, other=1) != 0
        return tl.where(kept, x, -float("inf")), kept & inside


@triton.jit
def store_zeros(grad, low, high, BLOCK: tl.constexpr):
    for block in range(low, high, BLOCK):
        to = block + tl.arange(0, BLOCK)
        tl.store(grad + to, tl.zeros((BLOCK,), grad.dtype.element_ty), mask=to < high)


@triton.jit
def row_scale(scale, temperatures, row, T: tl.constexpr):
    value = tl.full((), scale, T)
    if temperatures is not None:
        value = value / tl.load(temperatures + row)
    return value


@triton.jit
def bent(x, inner, SOFTCAP: tl.constexpr):
    """y, which times scale is z: tanh(inner x) under a softcap, and x without one."""
    return tl.where(x == -float("inf"), -float("inf"), tanh(x * inner)) if SOFTCAP else x


@triton.jit
def transformed(x, scale, inner, SOFTCAP: tl.constexpr):
    """(z, tanh): z = scale tanh(inner x) under a softcap, and scale x without one (tanh is then 0)."""
    if SOFTCAP:
        bent = tanh(x * inner)
        return tl.where(x == -float("inf"), -float("inf"), bent * scale), bent
    else:
        return x * scale, 0.0


@triton.jit
def lse_and_rest(m, total):
    """m + log total, rounded, and what rounding took."""
    log_total = tl.log(total)
    lse = m + log_total
    rest = tl.where(tl.abs(m) > log_total, log_total - (lse - m), m - (lse - log_total))
    return lse, tl.where(total > 0, rest, 0.0)


def factors(temperature: float, softcap: float, logit_scale: float) -> tuple[float, float, bool]:
    """(scale, inner, SOFTCAP) of `transformed`."""
    if softcap == float("inf"):
        return logit_scale / temperature, 1.0, False
    return softcap / temperature, logit_scale / softcap, True


def row_strides(x: Tensor) -> tuple[int, int]:
    """Over batch and time of [B, T, V]; [N, V] is one batch of N rows."""
    return (x.stride(0) if x.dim() == 3 else 0), x.stride(-2)


def ids_per_row(ids: Tensor, logits: Tensor) -> int:
    """Ids are one per row, or K in a dimension of their own."""
    return ids.shape[-1] if ids.dim() == logits.dim() else 1


def keep_arguments(keep_mask: Tensor | None) -> tuple:
    """(keep, its strides over batch and time)."""
    if keep_mask is None:
        return None, 0, 0
    return keep_mask.view(torch.uint8), *row_strides(keep_mask)


def aligned_rows(logits: Tensor, *others: Tensor | None) -> bool:
    """Whether every row of logits, and of what goes with them, begins at a multiple of VEC."""
    rows = [x for x in (logits, *others) if x is not None]
    return all(stride % vector(logits) == 0 for x in rows for stride in row_strides(x))


def vector(logits: Tensor) -> int:
    """Logits in 16 bytes."""
    return 16 // logits.element_size()
