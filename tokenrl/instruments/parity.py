"""The one tolerance rule: a kernel against the fp64 reference, next to the reference in the kernel's precision."""

import torch
from torch import Tensor

ULPS = 8


def errors(kernel: Tensor, truth: Tensor, base: Tensor) -> list[tuple[str, float, float]]:
    """(norm, error, allowed) in the largest entry and in L2.

    kernel: what is tested. truth: the fp64 reference. base: the same reference in the kernel's precision. The kernel
    may err at most twice as much as the base does, plus a few ulps of the largest entry.
    """
    eps = torch.finfo(kernel.dtype).eps
    k, b, t = (x.detach().double().flatten() for x in (kernel, base, truth))
    largest = t.abs().max().item() if t.numel() else 0.0
    rows = []
    for norm, p in (("max", torch.inf), ("L2", 2)):
        size = 1.0 if p == torch.inf else t.numel() ** 0.5
        allowed = 2 * torch.linalg.vector_norm(b - t, p).item() + ULPS * eps * largest * size if t.numel() else 0.0
        rows.append((norm, torch.linalg.vector_norm(k - t, p).item() if t.numel() else 0.0, allowed))
    return rows


def close(kernel: Tensor, truth: Tensor, base: Tensor, what: str = "") -> None:
    """Asserts the tolerance rule; entries that are not finite in the truth must be the same in the kernel."""
    assert kernel.shape == truth.shape, f"{what}: shape {list(kernel.shape)}, truth {list(truth.shape)}"
    assert truth.dtype == torch.float64, "the truth is fp64"
    finite = truth.isfinite()
    odd_kernel, odd_truth = kernel[~finite].double(), truth[~finite]
    assert torch.equal(odd_kernel.nan_to_num(nan=7.0), odd_truth.nan_to_num(nan=7.0)), (
        f"{what}: {odd_kernel} not {odd_truth}"
    )
    for norm, error, allowed in errors(kernel[finite], truth[finite], base[finite]):
        assert error <= allowed, f"{what}: {norm} error {error:.3e}, allowed {allowed:.3e}"
