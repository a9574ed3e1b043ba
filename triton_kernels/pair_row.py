"""What the kernels over rows of two heads' logits share: how both are read, and what a kind makes of them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .divergences import DIVERGENCES
from .vocabulary import (
    aligned_rows,
    factors,
    in_packs,
    keep_arguments,
    load_block,
    row_begin,
    row_scale,
    row_strides,
    transformed,
    vector,
)

MOST_PARAMS = 2


class Head(NamedTuple):
    """Kernel argument: logits, and what becomes of them before the softmax. Each head has its own SOFTCAP and ALIGNED,
    whether 16 bytes divide all distances between its rows."""

    logits: Tensor
    keep: Tensor | None
    temperatures: Tensor | None


class Strides(NamedTuple):
    """Distances between a head's rows, and between those of its keep mask."""

    batch: int
    time: int
    keep_batch: int
    keep_time: int


class Row(NamedTuple):
    """A head's row: where it begins, how far its keep mask is from there, and what makes z of its logits."""

    begin: tl.tensor
    keep_lag: tl.tensor
    scale: tl.tensor
    inner: tl.tensor


class Lse(NamedTuple):
    """Of a head's row: rounded, and what rounding took."""

    rounded: tl.tensor
    rest: tl.tensor


@triton.jit
def row_of(head, strides, row, time, scale, inner, ALIGNED: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr):
    begin = in_packs(row_begin(row, time, strides.batch, strides.time), ALIGNED, VEC)
    keep_lag = in_packs(row_begin(row, time, strides.keep_batch, strides.keep_time) - begin, ALIGNED, VEC)
    return Row(begin, keep_lag, row_scale(scale, head.temperatures, row, T), tl.full((), inner, T))


@triton.jit
def lse_of(statistics, row, rows, HEAD: tl.constexpr):
    at = statistics + 2 * HEAD * rows + row
    return Lse(tl.load(at), tl.load(at + rows))


@triton.jit
def load_z(head, of, at, inside, SOFTCAP: tl.constexpr):
    """(z, dz / dx) of a block of a row; what is outside is -inf."""
    x, _ = load_block(head.logits, head.keep, at, of.keep_lag, inside, of.scale.dtype)
    z, bent = transformed(x, of.scale, of.inner, SOFTCAP)
    slope = of.scale * of.inner * (1 - bent * bent) if SOFTCAP else of.scale
    return z, slope


@triton.jit
def log_prob(z, lse):
    """(log-prob, prob)."""
    log_p = (z - lse.rounded) - lse.rest
    return log_p, tl.exp(log_p)


@triton.jit
def diverged(log_p, log_r, p, r, params, KIND: tl.constexpr, NUM_PARAMS: tl.constexpr):
    if NUM_PARAMS == 0:
        value, by_p, by_r = KIND(log_p, log_r, p, r)
    elif NUM_PARAMS == 1:
        value, by_p, by_r = KIND(log_p, log_r, p, r, params[0])
    else:
        value, by_p, by_r = KIND(log_p, log_r, p, r, params[0], params[1])
    return value, by_p, by_r


def _head(
    logits: Tensor, temperature: float, temperatures: Tensor | None, softcap: float, logit_scale: float,
    keep_mask: Tensor | None,
) -> tuple[Head, Strides, tuple[float, float], bool, bool]:  # fmt: skip
    """(the head, its strides, its scale and what is inside its softcap, whether it has one, whether it is ALIGNED)."""
    scale, inner, capped = factors(temperature, softcap, logit_scale)
    kept, *keep_strides = keep_arguments(keep_mask)
    strides = Strides(*row_strides(logits), *keep_strides)
    return Head(logits, kept, temperatures), strides, (scale, inner), capped, aligned_rows(logits, keep_mask)


class Call(NamedTuple):
    """An op's arguments as its kernels take them. counted: which rows do. sizes: vocab, time, parts. strides, scales:
    of both heads. kind, launch: options of a launch."""

    heads: tuple[Head, Head]
    strides: tuple[int, ...]
    counted: Tensor | None
    sizes: tuple[int, int, int]
    scales: tuple[float, ...]
    params: tuple[float, ...]
    kind: dict
    launch: dict


def call_of(logits: Tensor, other: Tensor, given: tuple) -> Call:
    rows, *transforms, kind, params = given
    head, strides, own, capped, aligned = _head(logits, *transforms[:5])
    other_head, other_strides, others, other_capped, other_aligned = _head(other, *transforms[5:])
    *_, time, vocab = logits.shape
    parts = launch.vocab_parts(logits.shape[:-1].numel(), vocab, logits.device)
    block = launch.vocab_block(vocab, logits.dtype, parts, heavy=True)
    how = {
        "SOFTCAP": (capped, other_capped), "ALIGNED": (aligned, other_aligned), "SPLIT": parts > 1, "BLOCK": block,
        "VEC": vector(logits), "num_warps": launch.vocab_warps(block, 8),
    }  # fmt: skip
    counted, numbers = None if rows is None else rows.view(torch.uint8), (*params, 0.0, 0.0)[:MOST_PARAMS]
    of_kind = {"KIND": DIVERGENCES[kind], "NUM_PARAMS": len(params)}
    heads, scales = (head, other_head), (*own, *others)
    return Call(heads, (*strides, *other_strides), counted, (vocab, time, parts), scales, numbers, of_kind, how)
