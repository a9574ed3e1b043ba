"""Matrix products of the head: torch's GEMMs, with the sums of many products in fp32."""

import math
from typing import Any

import numpy
import torch
from torch import Tensor

from ...batch.checks import values_known
from ..ranges import tell_of_memory

# Rows of a product that stay in a CPU's cache until they are added up.
CPU_ROWS = 4096
SUMMED_ROWS = 64
ALIGNMENT = 64  # bytes, of a cache line


def empty(count: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[count] on the device of `like`. On a CPU from malloc and aligned here: glibc before 2.38 does not find a freed
    block of torch's aligned_alloc again, and beside tensors of the same size the process grew by one per call."""
    if not values_known(like):
        return like.new_empty(count, dtype=dtype)
    nbytes = count * dtype.itemsize
    memory = numpy.empty(nbytes + ALIGNMENT, numpy.uint8)
    tell_of_memory(memory)
    begin = -memory.ctypes.data % ALIGNMENT
    found = torch.from_numpy(memory[begin : begin + nbytes]).view(dtype)
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled():
        found.fill_(math.nan)  # as torch fills its own
    return found


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not (values_known(x) and x.is_contiguous()):
        return torch.empty_like(x, dtype=dtype)
    return empty(x.numel(), x, dtype).view(x.shape)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums of products of that dtype: fp32, or fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Linear(torch.autograd.Function):
    """torch's linear outside of autocast, which looks at products of a backward too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.biased = inputs[2] is not None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_weight = linear(grad.t(), x.t())
        return linear(grad, weight.t()), of_weight, grad.sum(0) if ctx.biased else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, [N, D], in their own dtype whatever autocast is; differentiable as often as wanted."""
    if torch.is_autocast_enabled(x.device.type):
        return _Linear.apply(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def write_product(out: Tensor, a: Tensor, b: Tensor, by: float = 1.0) -> None:
    """out = by a @ b, out in the dtype of a or in sum_dtype."""
    if out.is_cuda:
        mixed = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
        torch.mm(a, b, **mixed, out=out)
    else:
        for some, rows in zip(out.split(CPU_ROWS), a.split(CPU_ROWS), strict=True):
            if out.dtype == a.dtype:
                torch.mm(rows, b, out=some)
            else:
                some.copy_(torch.mm(rows, b))
    if by != 1:
        out.mul_(by)


def add_product(total: Tensor, a: Tensor, b: Tensor, by: float = 1.0) -> None:
    """total += by a @ b, total in sum_dtype.

    cuBLAS adds 16-bit products to an fp32 total without rounding them. On a CPU torch has no such GEMM: there each
    product, itself summed in fp32, is rounded once to 16 bits before it is added.
    """
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, alpha=by, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=by, out=total)
    else:
        for some, rows in zip(total.split(CPU_ROWS), a.split(CPU_ROWS), strict=True):
            some.add_(torch.mm(rows, b), alpha=by)


def sum_bytes(out: Tensor | None, dtype: torch.dtype) -> int:
    """What several products in that dtype take for their sum beside `out`, and one does not."""
    if out is None or out.dtype != dtype or dtype == sum_dtype(dtype):
        return 0
    return out.numel() * sum_dtype(dtype).itemsize


class ProductSum:
    """out = the sum of products, in sum_dtype until finish().

    once: there will be one product at most. adds: out, in sum_dtype, holds a sum that is added to."""

    def __init__(self, out: Tensor, dtype: torch.dtype, *, once: bool, adds: bool = False):
        in_place = out.dtype == sum_dtype(dtype) or (once and out.dtype == dtype)
        self.out, self.begun = out, adds
        self.total = out if in_place else empty_like(out, sum_dtype(dtype))

    def add(self, a: Tensor, b: Tensor, by: float) -> None:
        (add_product if self.begun else write_product)(self.total, a, b, by)
        self.begun = True

    def finish(self) -> None:
        if not self.begun:
            self.out.zero_()
        elif self.total is not self.out:
            self.out.copy_(self.total)
        self.total = self.out  # gives the sum's memory back


def multiples(rows: Tensor, by: Tensor, out: Tensor | None = None) -> Tensor:
    """by_t rows_t, in out, maybe the rows themselves; rows [N, D], by [N], of 0 it is 0 whatever the row holds."""
    by = by[:, None]
    return torch.mul(rows, by, out=out).masked_fill_(by == 0, 0)


def column_sums(x: Tensor) -> Tensor:
    """The sum of the rows of x, in sum_dtype; a few rows at a time, as a CPU's sum in another dtype copies them."""
    if x.is_cuda:
        return x.sum(0, dtype=sum_dtype(x.dtype))
    total = x.new_zeros(x.shape[1], dtype=sum_dtype(x.dtype))
    for rows in x.split(SUMMED_ROWS):
        total += rows.sum(0, dtype=total.dtype)
    return total


def weighed_sum(weights: Tensor, values: Tensor) -> Tensor:
    """sum_t w_t x_t; a weight of 0 hides even an infinite number."""
    return torch.where(weights != 0, weights * values, 0).sum()


def scaled(x: Tensor, by: Tensor, dtype: torch.dtype, reuse: bool = False) -> Tensor:
    """x times a number, in sum_dtype and rounded once to dtype. reuse: in x's own memory where the dtype is its own."""
    by = by.to(sum_dtype(x.dtype))
    out = x if reuse and dtype == x.dtype else empty_like(x, dtype)
    if values_known(by) and dtype == x.dtype:  # a product with a number, 60x quicker than one with a wider tensor
        return torch.mul(x, by.item(), out=out)
    by = by.reshape((1,) * x.dim())  # of a dimension, or torch would round it to 16 bits first
    if x.is_cuda:
        return torch.mul(x, by, out=out)
    for some, rows in zip(out.split(CPU_ROWS), x.split(CPU_ROWS), strict=True):
        some.copy_(rows * by)
    return out
