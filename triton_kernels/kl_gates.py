"""Estimators of KL(pi || ref) as gates, tokenrl/objectives/gates/kl.py: functions as those of gates.py."""

import triton
import triton.language as tl

from .scalar import expm1_of, k3_of, smaller


@triton.jit
def kl_k1(s, x, logp, advantage, t):
    value = s
    d_s = 1.0
    return value, d_s, 0.0, False, False, False


@triton.jit
def kl_abs(s, x, logp, advantage, t):
    value = tl.abs(s)
    d_s = tl.where(s > 0, 1.0, tl.where(s < 0, -1.0, 0.0))
    return value, d_s, 0.0, False, False, False


@triton.jit
def kl_k2(s, x, logp, advantage, t):
    value = s * s / 2
    d_s = s
    return value, d_s, 0.0, False, False, False


@triton.jit
def kl_k3(s, x, logp, advantage, t, ceiling):
    k3 = k3_of(-s)
    value = smaller(k3, ceiling)
    d_s = tl.where(k3 > ceiling, 0.0, -expm1_of(-s))
    return value, d_s, 0.0, False, False, False


@triton.jit
def kl_k1_unbiased(s, x, logp, advantage, t):
    value = s
    d_s = s
    return value, d_s, 0.0, False, False, False


@triton.jit
def kl_abs_unbiased(s, x, logp, advantage, t):
    value = tl.abs(s)
    d_s = s
    return value, d_s, 0.0, False, False, False


@triton.jit
def kl_k3_unbiased(s, x, logp, advantage, t, ceiling):
    value = smaller(k3_of(-s), ceiling)
    d_s = s
    return value, d_s, 0.0, False, False, False
