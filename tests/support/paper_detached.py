"""Formulas typed out in floats and loops, for test_paper.py: objectives whose gradient flows through logp alone.

Each takes the valid tokens of a row: d (log ratios), p (log-probs), a (advantages). It gives their losses and the
matrix of derivatives, jacobian[t][j] = d l_t / d logp_j.
"""

import math


def clip(x, low, high):
    return min(max(x, low), high)


def diagonal(losses, slopes):
    n = len(losses)
    return losses, [[slopes[t] if t == j else 0.0 for j in range(n)] for t in range(n)]


def weighted(weights, p, a):
    """-w A logp."""
    losses = [-w * adv * logp for w, logp, adv in zip(weights, p, a, strict=True)]
    return diagonal(losses, [-w * adv for w, adv in zip(weights, a, strict=True)])


def reinforce(d, p, a):
    return weighted([1.0] * len(d), p, a)


def quadratic(beta):
    def formula(d, p, a):
        losses = [-adv * logp + beta / 2 * x * x for x, logp, adv in zip(d, p, a, strict=True)]
        return diagonal(losses, [-adv + beta * x for x, adv in zip(d, a, strict=True)])

    return formula


def topr(d, p, a):
    ratio = math.exp(sum(clip(x, -20, 20) for x in d))
    return weighted([1.0 if adv > 0 else min(ratio, 1.0) for adv in a], p, a)


def topr_of_tokens(d, p, a):
    return weighted(
        [1.0 if adv > 0 else min(math.exp(clip(x, -20, 20)), 1.0) for x, adv in zip(d, a, strict=True)], p, a
    )


def minpro(d, p, a):
    losses, slopes, lowest = [], [], None
    for x, adv, logp in zip(d, a, p, strict=True):
        x = clip(x, -20, 20)
        m = 1.0 if lowest is None else math.exp(lowest)
        w = clip(m * math.exp(x), 1 - 0.8, 1 + 4.0)
        losses.append(-w * adv * logp)
        slopes.append(-w * adv)
        lowest = x if lowest is None else min(lowest, x)
    return diagonal(losses, slopes)


def vespo(d, p, a):
    log_w = clip(sum(clip(x, -20, 20) for x in d), -20, 20)
    phi = {}
    for negative, k, decay in ((False, 2.0, 3.0), (True, 3.0, 2.0)):
        phi[negative] = math.exp(decay + k * log_w - decay * math.exp(log_w))
    return weighted([phi[adv < 0] for adv in a], p, a)


def dppo(divergence, eps):
    def formula(d, p, a):
        weights = []
        for x, logp, adv in zip(d, p, a, strict=True):
            new, old = math.exp(logp), min(math.exp(logp - x), 1.0)
            outwards = new > old if adv > 0 else new < old
            weights.append(0.0 if outwards and divergence(new, old, x) > eps else min(math.exp(x), 20.0))
        return weighted(weights, p, a)

    return formula


def total_variation(new, old, x):
    return abs(new - old)


def divergence(new, old, x):
    return -old * x + (1 - old) * math.log((1 - old + 1e-8) / (1 - new + 1e-8))


DETACHED = {
    "reinforce": reinforce,
    "gpg": reinforce,
    "dro": quadratic(0.05),
    "kimi15": quadratic(0.1),
    "topr": topr,
    "topr_roll": topr_of_tokens,
    "topr_trinity": topr_of_tokens,
    "minpro": minpro,
    "vespo": vespo,
    "dppo_topk": dppo(lambda new, old, x: 0.0, 0.15),  # with divergences: test_dppo_with_a_given_divergence
    "dppo_tv": dppo(total_variation, 0.15),
    "dppo_kl": dppo(divergence, 0.05),
}
