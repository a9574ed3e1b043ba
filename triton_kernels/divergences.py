"""One function per divergence of p from r: what an entry adds to the sum, and p, r times its partials. Formulas and
sources: tokenrl/objectives/divergences.py.

kind(log_p, log_r, p, r, *parameters) -> value, by_p, by_r
log_p, log_r may be -inf, where p, r are then 0. Each derivative stands on the line after its value.
"""

import triton
import triton.language as tl


@triton.jit
def _weighed(weight, log_weight, other):
    """weight (log_weight - other), 0 where the weight is, whatever the logs are."""
    return tl.where(weight > 0, weight * (log_weight - other), 0.0)


@triton.jit
def _mixed(p, r, share_of_r):
    """A mixture of p and r, and its logarithm; of nothing 0."""
    m = (1 - share_of_r) * p + share_of_r * r
    some = tl.where(m > 0, m, 1.0)
    return some, tl.log(some)


@triton.jit
def forward_kl(log_p, log_r, p, r):
    value = _weighed(r, log_r, log_p)
    by_p = -r
    by_r = value + r
    return value, by_p, by_r


@triton.jit
def reverse_kl(log_p, log_r, p, r):
    value = _weighed(p, log_p, log_r)
    by_p = value + p
    by_r = -p
    return value, by_p, by_r


@triton.jit
def cross_entropy(log_p, log_r, p, r):
    value = _weighed(r, 0.0, log_p)
    by_p = -r
    by_r = value
    return value, by_p, by_r


@triton.jit
def jsd(log_p, log_r, p, r, beta):
    _, log_m = _mixed(p, r, beta)
    by_p = (1 - beta) * _weighed(p, log_p, log_m)
    by_r = beta * _weighed(r, log_r, log_m)
    return by_p + by_r, by_p, by_r


@triton.jit
def skew_forward_kl(log_p, log_r, p, r, share):
    m, log_m = _mixed(p, r, share)
    value = _weighed(r, log_r, log_m)
    by_p = -r * ((1 - share) * p / m)
    by_r = value + r * (1 - share * r / m)
    return value, by_p, by_r


@triton.jit
def skew_reverse_kl(log_p, log_r, p, r, share):
    m, log_m = _mixed(p, r, 1 - share)
    value = _weighed(p, log_p, log_m)
    by_p = value + p * (1 - share * p / m)
    by_r = -p * ((1 - share) * r / m)
    return value, by_p, by_r


@triton.jit
def total_variation(log_p, log_r, p, r):
    sign = tl.where(p > r, 0.5, tl.where(p < r, -0.5, 0.0)).to(p.dtype)
    value = sign * (p - r)
    by_p = sign * p
    by_r = -sign * r
    return value, by_p, by_r


@triton.jit
def bhattacharyya(log_p, log_r, p, r):
    value = tl.exp((log_p + log_r) / 2)
    by_p = value / 2
    by_r = value / 2
    return value, by_p, by_r


@triton.jit
def squared_hellinger(log_p, log_r, p, r):
    root_p, root_r = tl.exp(log_p / 2), tl.exp(log_r / 2)
    apart = root_p - root_r
    value = apart * apart / 2
    by_p = root_p * apart / 2
    by_r = -root_r * apart / 2
    return value, by_p, by_r


@triton.jit
def alpha_beta(log_p, log_r, p, r, alpha, beta):
    both = tl.exp(alpha * log_r + beta * log_p)
    of_p, of_r = tl.exp((alpha + beta) * log_p), tl.exp((alpha + beta) * log_r)
    value = (alpha / (alpha + beta) * of_r + beta / (alpha + beta) * of_p - both) / (alpha * beta)
    by_p = (of_p - both) / alpha
    by_r = (of_r - both) / beta
    return value, by_p, by_r


DIVERGENCES = {
    function.fn.__name__: function
    for function in (
        forward_kl, reverse_kl, cross_entropy, jsd, skew_forward_kl, skew_reverse_kl, total_variation, bhattacharyya,
        squared_hellinger, alpha_beta,
    )
}  # fmt: skip

# Of those that are one of p and r times a sum of the logs, in which the other's has the factor -1: which. They can be
# summed before p and r have been normalised.
WEIGHT = {"forward_kl": "r", "reverse_kl": "p", "cross_entropy": "r"}
