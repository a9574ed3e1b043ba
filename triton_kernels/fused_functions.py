"""What gates that tokenrl/fusion/ writes call: torch's functions, beside scalar.py's (as csrc/fused/functions.h)."""

import triton
import triton.language as tl

from .scalar import expm1_of, exponential, larger, power, smaller, tanh

__all__ = [
    "expm1_of", "exponential", "larger", "log1p_of", "power", "sigmoid_of", "sign_of", "smaller", "sqrt_of", "tanh",
]  # fmt: skip


@triton.jit
def sigmoid_of(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + exponential(-x))


@triton.jit
def sign_of(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def sqrt_of(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def log1p_of(x):
    """log(1 + x): near 0 twice the series of artanh at x / (2 + x)."""
    TERMS: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    z = tl.where(tl.abs(x) < 0.5, x, 0.0) / (2 + tl.where(tl.abs(x) < 0.5, x, 0.0))
    series = tl.zeros_like(x) + 1 / (2 * TERMS + 1)
    for k in tl.static_range(TERMS):
        series = series * (z * z) + 1 / (2 * (TERMS - k) - 1)
    return tl.where(tl.abs(x) < 0.5, 2 * z * series, tl.log(1 + x))
