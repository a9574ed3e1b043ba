"""Scalar functions that gates and statistics are written in, for fp32 and fp64 (as csrc/scalar.h)."""

import triton
import triton.language as tl

from .launch import FOR_NVIDIA, INTERPRETED

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_INSTRUCTION = tl.constexpr(FOR_NVIDIA)
_ROUNDS_PRODUCTS = tl.constexpr(INTERPRETED)


@triton.jit
def smaller(a, b):
    """min by selection: where a NaN is compared the first argument wins, on the GPU and in every interpreter."""
    return tl.where(b < a, b, a)


@triton.jit
def larger(a, b):
    return tl.where(b > a, b, a)


@triton.jit
def product(a, b):
    """a b, where a factor a of 0 hides even an infinite b."""
    return tl.where(a == 0, 0.0, a * b)


@triton.jit
def clip(x, low, high):
    return smaller(larger(x, low), high)


@triton.jit
def fma(a, b, c):
    """a b + c of a block a, in fp32 rounded once: in the interpreter, which rounds the product, too, in fp64."""
    if _ROUNDS_PRODUCTS and a.dtype == tl.float32:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def widen(x, T: tl.constexpr):
    """A block x in T. Of bf16 in one instruction each, where the compiler would take a half out of its word first."""
    if _INSTRUCTION and x.dtype == tl.bfloat16 and T == tl.float32:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(T)


@triton.jit
def exp2(t):
    """2^t; subnormal results may be 0. Of fp32 one instruction on NVIDIA's GPUs: with subnormals it were four."""
    if _INSTRUCTION and t.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(t)


@triton.jit
def _power_of_two(n):
    """2^n, exact, for integers -127 < n < 128."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _beyond_linear(r):
    """e^r - 1 - r for |r| <= ln2 / 2: Taylor's series in fp64, Cephes' expf polynomial in fp32."""
    if r.dtype == tl.float64:
        p = r * (1 / 1307674368000) + 1 / 87178291200
        p = p * r + 1 / 6227020800
        p = p * r + 1 / 479001600
        p = p * r + 1 / 39916800
        p = p * r + 1 / 3628800
        p = p * r + 1 / 362880
        p = p * r + 1 / 40320
        p = p * r + 1 / 5040
        p = p * r + 1 / 720
        p = p * r + 1 / 120
        p = p * r + 1 / 24
        p = p * r + 1 / 6
    else:
        p = r * 1.9875691500e-4 + 1.3981999507e-3
        p = p * r + 8.3334519073e-3
        p = p * r + 4.1665795894e-2
        p = p * r + 1.6666665459e-1
    return (p * r + 0.5) * r * r


@triton.jit
def exponential(x):
    """e^x within 1 ulp. tl.exp rounds x log2(e) in fp32, which costs |x| ulp: here x = n ln2 + r comes first.

    2^n is put together from two halves so that neither over- nor underflows early."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        bounded = clip(x, -104.0, 89.0)
        n = tl.floor(bounded * 1.44269504088896341 + 0.5)
        r = bounded - n * 0.693359375
        r = r + n * 2.12194440e-4
        whole = tl.where(x == x, n, 0.0).to(tl.int32)
        half = whole >> 1
        return (_beyond_linear(r) + r + 1) * _power_of_two(half) * _power_of_two(whole - half)


@triton.jit
def wide_exponential(x):
    """e^x in fp64, beyond the range of fp32: of the precision of x, with fp64's exponent."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        bounded = clip(x, -708.0, 709.0)
        n = tl.floor(bounded * 1.44269504088896341 + 0.5)
        r = bounded - n * 0.693359375
        r = r + n * 2.12194440e-4
        bits = (tl.where(x == x, n, 0.0).to(tl.int64) + 1023) << 52
        y = (_beyond_linear(r) + r + 1).to(tl.float64) * bits.to(tl.float64, bitcast=True)
        return tl.where(x < -708.0, 0.0, tl.where(x > 709.0, float("inf"), y))


@triton.jit
def expm1_of(x):
    """e^x - 1, exact near 0."""
    return tl.where(tl.abs(x) < 0.34, _beyond_linear(x) + x, exponential(x) - 1)


@triton.jit
def k3_of(x):
    """e^x - 1 - x, exact near 0, where Schulman's k3 lives."""
    return tl.where(tl.abs(x) < 0.34, _beyond_linear(x), (exponential(x) - 1) - tl.where(x < 40, x, 0.0))


@triton.jit
def wide_k3_of(x):
    """The same in fp64, beyond the range of fp32."""
    return tl.where(x < 60.0, k3_of(smaller(x, 60.0)).to(tl.float64), wide_exponential(x))


@triton.jit
def tanh(x):
    """Odd, and exact near 0: Cephes' tanhf polynomial in fp32, e^2x - 1 by Taylor's series in fp64."""
    x = clip(x, -22.0, 22.0)
    q = tl.exp(-2 * tl.abs(x))
    far = (1 - q) / (1 + q)
    far = tl.where(x < 0, -far, far)
    if x.dtype == tl.float64:
        near = _beyond_linear(2 * x) + 2 * x
        return tl.where(tl.abs(x) < 0.17, near / (near + 2), far)
    else:
        s = x * x
        p = s * -5.70498872745e-3 + 2.06390887954e-2
        p = p * s - 5.37397155531e-2
        p = p * s + 1.33314422036e-1
        p = p * s - 3.33332819422e-1
        return tl.where(tl.abs(x) < 0.625, p * s * x + x, far)


@triton.jit
def power(t, p):
    """t^p for a count t >= 1; the powers that methods use are exact and cheap."""
    root = tl.sqrt(t) if t.dtype == tl.float64 else tl.sqrt_rn(t)
    general = exponential(p * tl.log(t))
    return tl.where(p == 0.5, root, tl.where(p == -0.5, 1 / root, general))
