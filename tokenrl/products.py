"""Matrix products of the head: torch's GEMMs, with the sums of many products in fp32."""

import torch
from torch import Tensor

# Rows of a product that stay in a CPU's cache until they are added up.
CPU_ROWS = 4096


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums of products of that dtype: fp32, or fp64."""
    return torch.promote_types(dtype, torch.float32)


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b"""
    if out.is_cuda:
        torch.mm(a, b, out=out)
        return
    for some, rows in zip(out.split(CPU_ROWS), a.split(CPU_ROWS), strict=True):
        torch.mm(rows, b, out=some)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, total in sum_dtype.

    cuBLAS adds 16-bit products to an fp32 total without rounding them. On a CPU torch has no such GEMM: there each
    product, itself summed in fp32, is rounded once to 16 bits before it is added.
    """
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        for some, rows in zip(total.split(CPU_ROWS), a.split(CPU_ROWS), strict=True):
            some.add_(torch.mm(rows, b))


class ProductSum:
    """out = sum of products, each added to fp32 until finish(). out: zeros, or in sum_dtype what is added to.

    once: there will be one product, and out is zeros."""

    def __init__(self, out: Tensor, dtype: torch.dtype, once: bool):
        self.out, self.once = out, once and out.dtype == dtype
        summed = sum_dtype(dtype)
        self.total = out if self.once or out.dtype == summed else out.new_zeros(out.shape, dtype=summed)

    def add(self, a: Tensor, b: Tensor) -> None:
        (product_into if self.once else add_product)(self.total, a, b)

    def finish(self) -> Tensor:
        return self.out if self.total is self.out else self.out.copy_(self.total)


def column_sums(x: Tensor) -> Tensor:
    """The sum of the rows of x, in sum_dtype."""
    return torch.cat([columns.sum(0, dtype=sum_dtype(x.dtype)) for columns in x.split(CPU_ROWS, 1)])
