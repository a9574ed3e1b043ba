"""The one tolerance rule: a kernel against the fp64 reference, next to the reference in the kernel's precision."""

import torch
from torch import Tensor

ULPS = 8
NORMS = {"max": torch.inf, "L2": 2}


class Tally:
    """errors(...) of tensors that come in parts. odd: entries that are not finite in the truth and others in what is
    tested; those that are the same count no further."""

    def __init__(self) -> None:
        self.odd, self._count, self._largest, self._eps = 0, 0, 0.0, 0.0
        self._norms = {norm: [0.0, 0.0] for norm in NORMS}  # of (what is tested, base) less the truth

    def add(self, kernel: Tensor, truth: Tensor, base: Tensor) -> None:
        self._eps = torch.finfo(kernel.dtype).eps
        k, b, t = (x.detach().double().flatten() for x in (kernel, base, truth))
        if not (finite := t.isfinite()).all():
            self.odd += odd_ones(k, t)
            k, b, t = (x[finite] for x in (k, b, t))
        if not t.numel():
            return
        self._count, self._largest = self._count + t.numel(), max(self._largest, t.abs().max().item())
        for which, apart in enumerate((k - t, b - t)):
            for norm, p in NORMS.items():
                both = [self._norms[norm][which], torch.linalg.vector_norm(apart, p).item()]
                self._norms[norm][which] = torch.linalg.vector_norm(torch.tensor(both, dtype=t.dtype), p).item()

    def errors(self) -> list[tuple[str, float, float]]:
        """(norm, error, allowed)"""
        ulps = ULPS * self._eps * self._largest
        sizes = {"max": 1.0, "L2": self._count**0.5}
        return [(norm, k, 2 * b + ulps * sizes[norm]) for norm, (k, b) in self._norms.items()]


def errors(kernel: Tensor, truth: Tensor, base: Tensor) -> list[tuple[str, float, float]]:
    """(norm, error, allowed) in the largest entry and in L2. The kernel may err at most twice as much as the base does,
    plus a few ulps of the largest entry.

    Args:
        kernel: what is tested, of any shape and float dtype.
        truth: the fp64 reference, of that shape.
        base: the same reference in the kernel's precision.
    """
    tally = Tally()
    tally.add(kernel, truth, base)
    return tally.errors()


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
    """Asserts the tolerance rule; entries that are not finite in the truth must be the same in the kernel.

    Args:
        kernel: what is tested, of any shape and float dtype.
        truth: the fp64 reference, of that shape.
        base: the same reference in the kernel's precision.
        what: names it in the error.

    Raises:
        AssertionError: with the norm, the error and what is allowed.
    """
    assert kernel.shape == truth.shape, f"{what}: shape {list(kernel.shape)}, truth {list(truth.shape)}"
    assert truth.dtype == torch.float64, "the truth is fp64"
    finite = truth.isfinite()
    assert not odd_ones(kernel, truth), f"{what}: {kernel[~finite].double()} not {truth[~finite]}"
    for norm, error, allowed in errors(kernel[finite], truth[finite], base[finite]):
        assert error <= allowed, f"{what}: {norm} error {error:.3e}, allowed {allowed:.3e}"
