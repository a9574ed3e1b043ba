"""Scalar functions that gates and statistics are written in, for fp32 and fp64 (as csrc/scalar.h)."""

import triton
import triton.language as tl


@triton.jit
def smaller(a, b):
    """min by selection: where a NaN is compared the first argument wins, on the GPU and in every interpreter."""
    return tl.where(b < a, b, a)


@triton.jit
def larger(a, b):
    return tl.where(b > a, b, a)


@triton.jit
def clip(x, low, high):
    return smaller(larger(x, low), high)


@triton.jit
def _power_of_two(n):
    """2^n, exact, for integers -127 < n < 128."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x):
    """e^x within 2 ulp. tl.exp alone rounds x log2(e) once in fp32, which costs |x| ulp: here x = 2 h ln2 + r comes first."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    bounded = clip(x, -104.0, 89.0)
    h = tl.floor(bounded * 0.72134752044448170 + 0.5)
    r = bounded - h * 1.38671875
    r = r + h * 4.2438888e-4
    half = _power_of_two(h.to(tl.int32))
    return tl.exp(r) * half * half


@triton.jit
def expm1_of(x):
    """e^x - 1, exact near 0, where k3 lives: Kahan's (u - 1) x / log u with u = e^x cancels the rounding of u."""
    u = exponential(x)
    near = (u - 1) * x / tl.where(u == 1, 1.0, tl.log(u))
    return tl.where(tl.abs(x) > 1, u - 1, tl.where(u == 1, x, near))


@triton.jit
def power(t, p):
    """t^p for a count t >= 1; the powers that methods use are exact and cheap."""
    root = tl.sqrt(t)
    general = exponential(p * tl.log(t))
    return tl.where(p == 0.5, root, tl.where(p == -0.5, 1 / root, general))
