"""One function per gate: the loss of one token and its partials. Formulas and sources: tokenrl/objectives/gates/.

gate(s, x, logp, advantage, t, *parameters) -> value, d_s, d_logp, low, high, dual
s, x, logp, advantage, t: blocks of tokens (x: the own log ratio; t: the position, 1-based); parameters: numbers or
blocks, by the names and in the order of the gate in tokenrl/objectives/gates/. d_s, d_logp: partials with respect to
the statistic and the own log-prob, x's part in the latter; low, high, dual: where that bound is active.
Each derivative stands on the line after its value.
"""

import triton
import triton.language as tl

from .kl_gates import kl_abs, kl_abs_unbiased, kl_k1, kl_k1_unbiased, kl_k2, kl_k3, kl_k3_unbiased
from .scalar import clip, exponential, larger, product, smaller
from .scalar import power as power_of


@triton.jit
def _bounded(advantage, x, low, high, dual):
    """y of x and clip(x) with the larger loss -A y, at most dual where A < 0; and which bounds are active."""
    positive, negative = advantage > 0, advantage < 0
    clipped = clip(x, low, high)
    y = tl.where(positive, smaller(x, clipped), smaller(larger(x, clipped), dual))
    return y, negative & (x < low), positive & (x > high), negative & (x > dual)


@triton.jit
def _weighted(logp, advantage, weight):
    """-w A logp for a weight w without a gradient, and its derivative."""
    d_logp = product(-advantage, weight)
    value = product(d_logp, logp)
    return value, d_logp


@triton.jit
def ratio(s, x, logp, advantage, t):
    value = product(-advantage, exponential(s))
    d_s = value
    return value, d_s, 0.0, False, False, False


@triton.jit
def ppo_clip(s, x, logp, advantage, t, eps_low, eps_high, dual):
    ratio, low, high, above = _bounded(advantage, exponential(s), 1 - eps_low, 1 + eps_high, dual)
    value = product(-advantage, ratio)
    d_s = tl.where(low | high | above, 0.0, value)
    return value, d_s, 0.0, low, high, above


@triton.jit
def ppo_ntp(s, x, logp, advantage, t, eps_low, eps_high, dual, ntp):
    value, d_s, d_logp, low, high, above = ppo_clip(s, x, logp, advantage, t, eps_low, eps_high, dual)
    value -= product(ntp, logp)
    d_logp = -ntp
    return value, d_s, d_logp, low, high, above


@triton.jit
def log_band(s, x, logp, advantage, t, eps_low, eps_high, eps_dual, power):
    width = power_of(t, power)
    kept, low, high, above = _bounded(advantage, s, -eps_low * width, eps_high * width, eps_dual * width)
    value = product(-advantage, exponential(kept))
    d_s = tl.where(low | high | above, 0.0, value)
    return value, d_s, 0.0, low, high, above


@triton.jit
def cispo(s, x, logp, advantage, t, low, high):
    ratio = exponential(s)
    value, d_logp = _weighted(logp, advantage, clip(ratio, low, high))
    return value, 0.0, d_logp, ratio < low, ratio > high, False


@triton.jit
def sapo(s, x, logp, advantage, t, tau_pos, tau_neg):
    ratio = exponential(s)
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    z = tau * (ratio - 1)
    # sigmoid(z) = e^-|z| or 1 over 1 + e^-|z|: no overflow on either side.
    small = exponential(-tl.abs(z))
    value = -4 / tau * (tl.where(z < 0, small, 1.0) / (1 + small)) * advantage
    d_s = product(-4 * (small / ((1 + small) * (1 + small))) * advantage, ratio)
    return value, d_s, 0.0, False, False, False


@triton.jit
def cfpo(s, x, logp, advantage, t, eps):
    size, ratio = tl.abs(advantage), exponential(s)
    # Around the vertex: of an infinite ratio -A r and the square would be opposite infinities.
    from_vertex = ratio - 1 - tl.where(advantage < 0, -eps, eps)
    value = product(size / eps, from_vertex * from_vertex / 2) - (advantage + size * eps / 2)
    d_s = product(size / eps, from_vertex * ratio)
    return value, d_s, 0.0, False, False, False


@triton.jit
def sppo_token(s, x, logp, advantage, t, eps):
    ratio = exponential(s)
    low, high = ratio < 1 / (1 + eps), ratio > 1 + eps
    value = tl.where(low | high, 0.0, product(-advantage, s))
    d_s = tl.where(low | high, 0.0, -advantage)
    return value, d_s, 0.0, low, high, False


@triton.jit
def _probabilities(s, logp):
    """Of the token under the current and the old policy."""
    return smaller(exponential(logp), 1.0), smaller(exponential(logp - s), 1.0)


@triton.jit
def prime_rl(s, x, logp, advantage, t, eps_low, eps_high, eps_back, kl_tau):
    p, mu = _probabilities(s, logp)
    moved, positive, pull = p - mu, advantage > 0, product(kl_tau, s)
    low, high = moved < -tl.where(positive, eps_back, eps_low), moved > tl.where(positive, eps_high, eps_back)
    kept = tl.where(low | high, 0.0, product(-advantage, exponential(s)))
    value = kept + product(pull, s)
    d_s = kept + 2 * pull
    return value, d_s, 0.0, low, high, False


@triton.jit
def _clipped_ratio(log_ratio, eps_low, eps_high):
    """A ratio, its clipped self, and whether the clip passes a gradient."""
    ratio = exponential(log_ratio)
    return ratio, clip(ratio, 1 - eps_low, 1 + eps_high), (ratio >= 1 - eps_low) & (ratio <= 1 + eps_high)


@triton.jit
def dhpo(s, x, logp, advantage, t, mix, eps_low, eps_high, span_eps_low, span_eps_high):
    own, own_kept, own_passes = _clipped_ratio(x, eps_low, eps_high)
    span, span_kept, span_passes = _clipped_ratio(s, span_eps_low, span_eps_high)
    mixed, kept = product(mix, own) + product(1 - mix, span), mix * own_kept + (1 - mix) * span_kept
    # Where neither ratio is clipped it is the same number, and not another rounding of it.
    kept = tl.where((own_passes != 0) & (span_passes != 0), mixed, kept)
    low, high = (advantage < 0) & (mixed < kept), (advantage > 0) & (mixed > kept)
    bound = low | high
    value = product(-advantage, tl.where(bound, kept, mixed))
    d_s = tl.where(bound & (span_passes == 0), 0.0, product(-advantage * (1 - mix), span))
    d_logp = tl.where(bound & (own_passes == 0), 0.0, product(-advantage * mix, own))
    return value, d_s, d_logp, low, high, False


@triton.jit
def dhpo_branch(s, x, logp, advantage, t, mix, eps_low, eps_high, span_eps_low, span_eps_high):
    own, own_low, own_high, _ = _bounded(advantage, exponential(x), 1 - eps_low, 1 + eps_high, float("inf"))
    span, span_low, span_high, _ = _bounded(
        advantage, exponential(s), 1 - span_eps_low, 1 + span_eps_high, float("inf")
    )
    of_own, of_span = product(-advantage * mix, own), product(-advantage * (1 - mix), span)
    value = of_own + of_span
    d_s = tl.where(span_low | span_high, 0.0, of_span)
    d_logp = tl.where(own_low | own_high, 0.0, of_own)
    return value, d_s, d_logp, own_low | span_low, own_high | span_high, False


@triton.jit
def hapo(s, x, logp, advantage, t, eps_low, eps_high, dual, score, alpha, beta):
    score = score + tl.zeros_like(s)  # a block: see dppo
    ratio, uncertain, wider = exponential(s), score > 0, 1 + alpha * tl.abs(score)
    eps_low, eps_high = tl.where(uncertain, eps_low, eps_low * wider), tl.where(uncertain, eps_high * wider, eps_high)
    inside = (ratio > 1 - eps_low / 2) & (ratio < 1 + eps_high / 2)
    advantage = tl.where(inside == uncertain, advantage, advantage * (1 + beta * score))
    kept, low, high, above = _bounded(advantage, ratio, 1 - eps_low, 1 + eps_high, dual)
    value = product(-advantage, kept)
    d_s = tl.where(low | high | above, 0.0, value)
    return value, d_s, 0.0, low, high, above


@triton.jit
def reinforce(s, x, logp, advantage, t, tau):
    value, d_logp = _weighted(logp, advantage, 1 / (1 + tau))
    return value, 0.0, d_logp, False, False, False


@triton.jit
def rec(s, x, logp, advantage, t, weight_low, weight_high, low, high, ring_low, ring_high):
    ratio, positive, negative = exponential(s), advantage > 0, advantage < 0
    below = (ratio < low) & (negative | (positive & (ratio > ring_low)))
    above = (ratio > high) & (positive | (negative & (ratio < ring_high)))
    value, d_logp = _weighted(logp, advantage, tl.where(below | above, 0.0, clip(ratio, weight_low, weight_high)))
    return value, 0.0, d_logp, below, above, False


@triton.jit
def quadratic(s, x, logp, advantage, t, beta):
    value, d_logp = _weighted(logp, advantage, 1.0)
    d_s = product(beta, s)
    value += product(d_s, s / 2)
    return value, d_s, d_logp, False, False, False


@triton.jit
def topr(s, x, logp, advantage, t, ceiling, score):
    score = score + tl.zeros_like(s)  # a block: see dppo
    ratio, positive = exponential(s), tl.where(score == score, score, advantage) > 0
    value, d_logp = _weighted(logp, advantage, tl.where(positive, 1.0, smaller(ratio, ceiling)))
    return value, 0.0, d_logp, (positive == 0) & (ratio > ceiling), False, False


@triton.jit
def vespo(s, x, logp, advantage, t, k_pos, lambda_pos, k_neg, lambda_neg, floor):
    k, decay = tl.where(advantage < 0, k_neg, k_pos), tl.where(advantage < 0, lambda_neg, lambda_pos)
    log_ratio = clip(s, floor, 20.0)
    value, d_logp = _weighted(logp, advantage, exponential(decay + k * log_ratio - decay * exponential(log_ratio)))
    return value, 0.0, d_logp, False, False, False


@triton.jit
def _dppo(s, logp, advantage, p, mu, divergence, eps_low, eps_high, ceiling):
    """-min(r, ceiling) A logp of the tokens that are kept."""
    low = (advantage <= 0) & (p < mu) & (divergence > eps_low)
    high = (advantage > 0) & (p > mu) & (divergence > eps_high)
    dropped, ratio = low | high, exponential(s)
    value, d_logp = _weighted(logp, advantage, tl.where(dropped, 0.0, smaller(ratio, ceiling)))
    return value, 0.0, d_logp, low, high, (dropped == 0) & (ratio > ceiling)


@triton.jit
def dppo(s, x, logp, advantage, t, eps_low, eps_high, ceiling, divergence):
    p, mu = _probabilities(s, logp)
    # A block, as the interpreter cannot combine a number's comparison with a block's.
    return _dppo(s, logp, advantage, p, mu, divergence + tl.zeros_like(s), eps_low, eps_high, ceiling)


@triton.jit
def dppo_tv(s, x, logp, advantage, t, eps_low, eps_high, ceiling):
    p, mu = _probabilities(s, logp)
    return _dppo(s, logp, advantage, p, mu, tl.abs(p - mu), eps_low, eps_high, ceiling)


@triton.jit
def dppo_kl(s, x, logp, advantage, t, eps_low, eps_high, ceiling):
    p, mu = _probabilities(s, logp)
    divergence = (1 - mu) * tl.log((1 - mu + 1e-8) / (1 - p + 1e-8)) - product(mu, s)
    # A block, as the interpreter cannot combine a number's comparison with a block's.
    return _dppo(s, logp, advantage, p, mu, divergence + tl.zeros_like(s), eps_low, eps_high, ceiling)


@triton.jit
def identity(s, x, logp, advantage, t):
    value = logp
    d_logp = 1.0
    return value, 0.0, d_logp, False, False, False


GATES = {
    gate.__name__: gate
    for gate in (
        ratio, ppo_clip, ppo_ntp, log_band, sapo, cfpo, sppo_token, prime_rl, dhpo, dhpo_branch, hapo, cispo,
        reinforce, rec, quadratic, topr, vespo, dppo, dppo_tv, dppo_kl, kl_k1, kl_abs, kl_k2, kl_k3, kl_k1_unbiased,
        kl_abs_unbiased, kl_k3_unbiased, identity,
    )
}  # fmt: skip
NEED_POSITION = {"log_band"}  # those that read t
