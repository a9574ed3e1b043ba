"""Formulas typed out in floats and loops, for test_paper.py: objectives that mix ratios or have a form.

Each takes the valid tokens of a row: d (log ratios), p (log-probs), a (advantages); see paper_detached.py.
"""

import math

from paper_detached import clip, diagonal, weighted

INF = math.inf


def surrogate(rho, a, low, high, dual=INF):
    """(l, whether the unclipped branch is the active one) of max(-A rho, -A clip(rho)), dual clip for A < 0."""
    loss = max(-a * rho, -a * clip(rho, low, high))
    if a < 0:
        return min(loss, -a * dual), low <= rho <= dual
    return loss, rho <= high


def local_surrogate(ratio_of, low, high, dual=INF, cap=INF, clamp=20.0):
    """PPO's clip of e^s whose derivative is 1 with respect to the own logp; ratio_of(d so far, all d) -> s."""

    def formula(d, p, a):
        d = [clip(x, -clamp, clamp) for x in d]
        losses, slopes = [], []
        for t, adv in enumerate(a):
            s = ratio_of(d[: t + 1], d)
            loss, active = surrogate(math.exp(min(s, cap)), adv, low, high, dual)
            losses.append(loss)
            slopes.append(-adv * math.exp(s) if active and s <= cap else 0.0)
        return diagonal(losses, slopes)

    return formula


def prefix_sum(before, d):
    return sum(before)


def prefix_mean(before, d):
    return sum(before) / len(before)


def mean(before, d):
    return sum(d) / len(d)


def lowest(before, d):
    return (min(before[:-1]) if len(before) > 1 else 0.0) + before[-1]


def minpro_capped(d, p, a):
    d = [clip(x, -20, 20) for x in d]
    m = [min(1.0, min((math.exp(x) for x in d[:t]), default=1.0)) for t in range(len(d))]
    return weighted([clip(m_t * math.exp(x), 0.2, 5.0) for m_t, x in zip(m, d, strict=True)], p, a)


def dhpo(branch):
    def formula(d, p, a):
        d = [clip(x, -20, 20) for x in d]
        q, w, losses, slopes = math.exp(sum(d) / len(d)), 0.5, [], []
        q_clipped, q_in = clip(q, 1 - 3e-4, 1 + 4e-4), 1 - 3e-4 <= q <= 1 + 4e-4
        for x, adv in zip(d, a, strict=True):
            r = math.exp(x)
            r_clipped, r_in = clip(r, 0.8, 1.28), 0.8 <= r <= 1.28
            if branch:
                parts = [surrogate(r, adv, 0.8, 1.28), surrogate(q, adv, 1 - 3e-4, 1 + 4e-4)]
                losses.append(w * parts[0][0] + (1 - w) * parts[1][0])
                slopes.append(-adv * (w * r * parts[0][1] + (1 - w) * q * parts[1][1]))
                continue
            m, c = w * r + (1 - w) * q, w * r_clipped + (1 - w) * q_clipped
            losses.append(-min(m * adv, c * adv))
            free = m * adv <= c * adv
            slopes.append(-adv * (w * r * (free or r_in) + (1 - w) * q * (free or q_in)))
        return diagonal(losses, slopes)

    return formula


def ratio_loss(d, a):
    losses = [-adv * math.exp(clip(x, -20, 20)) for x, adv in zip(d, a, strict=True)]
    return losses, [loss if abs(x) <= 20 else 0.0 for loss, x in zip(losses, d, strict=True)]


def trimmed(d, a, eps=0.4):
    """(x', whether x' moves with x)."""
    kept = [min(x, eps) if adv >= 0 else max(x, -eps) for x, adv in zip(d, a, strict=True)]
    return kept, [x == y for x, y in zip(d, kept, strict=True)]


def gmpo(d, p, a):
    x, moves = trimmed(d, a)
    n = len(d)
    g = math.exp(sum(x) / n)
    return [-adv * g for adv in a], [[-adv * g / n * m for m in moves] for adv in a]


def hmpo(d, p, a):
    x, moves = trimmed(d, a)
    inverse = [math.exp(-y) for y in x]
    h = len(d) / sum(inverse)
    share = [y / sum(inverse) * m for y, m in zip(inverse, moves, strict=True)]
    return [-adv * h for adv in a], [[-adv * h * s for s in share] for adv in a]


def fiberpo(d, p, a, c_pos=0.12, c_neg=0.05, eps=0.04):
    x, n = [clip(y, -20, 20) for y in d], len(d)
    above = sum(y for y in x if y >= 0) / n
    below = -sum(y for y in x if y < 0) / n

    def gate(s, c):
        if s <= c:
            return s, 1.0
        return ((n + 1) * c - n * s, -n) if s < (1 + 1 / n) * c else (0.0, 0.0)

    (g_pos, slope_pos), (g_neg, slope_neg) = gate(above, c_pos), gate(below, c_neg)
    up = [y >= 0 for y in x]
    losses, jacobian = [], []
    for t, adv in enumerate(a):
        num, den = (x[t] - above, -below) if up[t] else (x[t] + below, above)
        g = math.exp(g_pos - g_neg + clip(num, -eps, eps) - clip(den, -eps, eps))
        losses.append(-adv * g)
        row = []
        for j in range(n):
            d_above, d_below = (1 / n, 0.0) if up[j] else (0.0, -1 / n)
            d_num = (j == t) - (d_above if up[t] else -d_below)
            d_den = -d_below if up[t] else d_above
            slope = slope_pos * d_above - slope_neg * d_below + d_num * (abs(num) < eps) - d_den * (abs(den) < eps)
            row.append(-adv * g * slope * (abs(d[j]) <= 20))
        jacobian.append(row)
    return losses, jacobian


def quantile(values, q):
    values = sorted(values)
    at = q * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[math.ceil(at)] - values[low])


def cppo(d, p, a):
    x = [clip(y, -20, 20) for y in d]
    far = [abs(math.exp(logp) - math.exp(logp - y)) for logp, y in zip(p, x, strict=True)]
    budget = clip(quantile(far, 0.9), 0.02, 0.04)
    n, spent, allowance, kept = len(d), 0.0, 0.0, []
    for t, (y, adv) in enumerate(zip(x, a, strict=True), start=1):
        w = 1 - 0.2 * (t - 1) / max(n - 1, 1)
        z = w * far[t - 1]
        kept.append(adv * (math.exp(y) - 1) <= 0 or z <= min(0.15, 0.15 + budget * allowance - spent))
        spent, allowance = spent + z, allowance + w
    losses, slopes = ratio_loss(d, a)
    return diagonal(
        [x * k for x, k in zip(losses, kept, strict=True)], [x * k for x, k in zip(slopes, kept, strict=True)]
    )


MIXED = {
    "ctpo_fixed": local_surrogate(prefix_sum, 0.8, 1.2, dual=3.0, cap=10),
    "ctpo_geomean_fixed": local_surrogate(prefix_mean, 0.8, 1.2, dual=3.0, cap=10),
    "sspo": local_surrogate(mean, 1 - 6e-3, 1 + 8e-3, cap=10, clamp=INF),
    "minpro_clip": local_surrogate(lowest, 0.8, 1.2),
    "minpro_capped": minpro_capped,
    "dhpo": dhpo(branch=False),
    "dhpo_branch": dhpo(branch=True),
    "gmpo": gmpo,
    "hmpo": hmpo,
    "fiberpo": fiberpo,
    "cppo": cppo,
}
