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


def sum_errors(kernel: Tensor, truth: Tensor, base: Tensor) -> list[tuple[str, float, float]]:
    """The same of a sum of which only the kernel's result is known, 0-d: in L1 of the terms, those of truth and base.

    Where terms cancel, the rounding of each is seen in a sum that is small beside it.
    """
    eps = torch.finfo(kernel.dtype).eps
    allowed = 2 * (base.double() - truth).abs().sum() + ULPS * eps * truth.abs().sum()
    return [("L1", (kernel.detach().double() - truth.sum()).abs().item(), allowed.item())]


def odd_ones(kernel: Tensor, truth: Tensor) -> int:
    """How many entries that are not finite in the truth are others in the kernel."""
    odd = ~truth.isfinite()
    return int((kernel[odd].double().nan_to_num(nan=7.0) != truth[odd].nan_to_num(nan=7.0)).sum())


def close(kernel: Tensor, truth: Tensor, base: Tensor, what: str = "") -> None:
    """Asserts the tolerance rule; entries that are not finite in the truth must be the same in the kernel."""
    assert kernel.shape == truth.shape, f"{what}: shape {list(kernel.shape)}, truth {list(truth.shape)}"
    assert truth.dtype == torch.float64, "the truth is fp64"
    finite = truth.isfinite()
    assert not odd_ones(kernel, truth), f"{what}: {kernel[~finite].double()} not {truth[~finite]}"
    for norm, error, allowed in errors(kernel[finite], truth[finite], base[finite]):
        assert error <= allowed, f"{what}: {norm} error {error:.3e}, allowed {allowed:.3e}"
