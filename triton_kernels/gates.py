"""One function per gate: the loss of one token and its partials. Formulas and sources: tokenrl/gates.py.

gate(s, logp, advantage, t, *parameters) -> value, d_s, d_logp, low, high, dual
s, logp, advantage, t: blocks of tokens (t: the position, 1-based); parameters: numbers or blocks, as in params().
d_s, d_logp: partials with respect to the statistic and the own log-prob; low, high, dual: where that bound is active.
Each derivative stands on the line after its value.
"""

import triton
import triton.language as tl

from .scalar import clip, expm1_of, exponential, k3_of, larger, power, smaller


@triton.jit
def _bounded(advantage, x, low, high, dual):
    """y of x and clip(x) with the larger loss -A y, at most dual where A < 0; and which bounds are active."""
    positive, negative = advantage > 0, advantage < 0
    clipped = clip(x, low, high)
    y = tl.where(positive, smaller(x, clipped), smaller(larger(x, clipped), dual))
    return y, negative & (x < low), positive & (x > high), negative & (x > dual)


@triton.jit
def ppo_clip(s, logp, advantage, t, eps_low, eps_high, dual):
    ratio, low, high, above = _bounded(advantage, exponential(s), 1 - eps_low, 1 + eps_high, dual)
    value = -advantage * ratio
    d_s = tl.where(low | high | above, 0.0, value)
    return value, d_s, 0.0, low, high, above


@triton.jit
def log_band(s, logp, advantage, t, eps_low, eps_high, eps_dual, power_of_t):
    width = power(t, power_of_t)
    kept, low, high, above = _bounded(advantage, s, -eps_low * width, eps_high * width, eps_dual * width)
    value = -advantage * exponential(kept)
    d_s = tl.where(low | high | above, 0.0, value)
    return value, d_s, 0.0, low, high, above


@triton.jit
def cispo(s, logp, advantage, t, low, high):
    ratio = exponential(s)
    weight = clip(ratio, low, high)
    value = -weight * advantage * logp
    d_logp = -weight * advantage
    return value, 0.0, d_logp, ratio < low, ratio > high, False


@triton.jit
def sapo(s, logp, advantage, t, tau_pos, tau_neg):
    ratio = exponential(s)
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    z = tau * (ratio - 1)
    # sigmoid(z) = e^-|z| or 1 over 1 + e^-|z|: no overflow on either side.
    small = exponential(-tl.abs(z))
    value = -4 / tau * (tl.where(z < 0, small, 1.0) / (1 + small)) * advantage
    d_s = -4 * ratio * (small / ((1 + small) * (1 + small))) * advantage
    return value, d_s, 0.0, False, False, False


@triton.jit
def kl_k1(s, logp, advantage, t):
    value = s
    d_s = 1.0
    return value, d_s, 0.0, False, False, False


@triton.jit
def kl_k2(s, logp, advantage, t):
    value = s * s / 2
    d_s = s
    return value, d_s, 0.0, False, False, False


@triton.jit
def kl_k3(s, logp, advantage, t, ceiling):
    k3 = k3_of(-s)
    value = smaller(k3, ceiling)
    d_s = tl.where(k3 > ceiling, 0.0, -expm1_of(-s))
    return value, d_s, 0.0, False, False, False


@triton.jit
def kl_k1_unbiased(s, logp, advantage, t):
    value = s
    d_s = s
    return value, d_s, 0.0, False, False, False


@triton.jit
def kl_k3_unbiased(s, logp, advantage, t, ceiling):
    value = smaller(k3_of(-s), ceiling)
    d_s = s
    return value, d_s, 0.0, False, False, False


@triton.jit
def identity(s, logp, advantage, t):
    value = logp
    d_logp = 1.0
    return value, 0.0, d_logp, False, False, False


GATES = {
    gate.__name__: gate
    for gate in (ppo_clip, log_band, cispo, sapo, kl_k1, kl_k2, kl_k3, kl_k1_unbiased, kl_k3_unbiased, identity)
}
NEED_POSITION = frozenset({"log_band"})
