"""e^x - 1 - x, what Schulman's k3 is made of, in torch; csrc/scalar.h and triton_kernels/scalar.py have the same."""

import torch
from torch import Tensor

NEAR = 0.5
TERMS = {torch.float64: 16}  # of the series, below 1 ulp at NEAR; in other precisions 9


def excess(x: Tensor) -> Tensor:
    """e^x - 1 - x without cancellation near 0, differentiable: x^2 / 2 (1 + x / 3 (1 + x / 4 (...))) there."""
    near = x.abs() < NEAR
    small, series = torch.where(near, x, 0), torch.ones_like(x)
    for n in range(TERMS.get(x.dtype, 9), 2, -1):
        series = 1 + small / n * series
    return torch.where(near, small * small / 2 * series, torch.expm1(x) - torch.where(x < 40, x, 0))
