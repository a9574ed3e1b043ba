"""Formulas typed out in floats and loops, for test_paper.py: rows that trainers have added. As in paper_detached.py."""

import math

from paper_detached import clip, diagonal, weighted


def opmd(d, p, a):
    return weighted([0.5] * len(d), p, a)


def rec(kept):
    def formula(d, p, a):
        ratios = [math.exp(clip(x, -20, 20)) for x in d]
        return weighted([float(kept(r, adv)) for r, adv in zip(ratios, a, strict=True)], p, a)

    return formula


def one_side(r, a):
    return r <= 1.2 if a > 0 else r >= 0.8


def ring(r, a):
    return 0.8 <= r <= 1.2 or (r <= 0.4 if a > 0 else r >= 3.0)


def cfpo(d, p, a):
    losses, slopes = [], []
    for x, adv in zip(d, a, strict=True):
        r = math.exp(clip(x, -20, 20))
        losses.append(-r * adv + abs(adv) / 0.4 * (r - 1) ** 2)
        slopes.append((-adv + abs(adv) / 0.2 * (r - 1)) * r if abs(x) <= 20 else 0.0)
    return diagonal(losses, slopes)


def sppo(d, p, a):
    kept = [float(-math.log(1.3) <= x <= math.log(1.3)) for x in d]
    losses = [-adv * x * keep for x, adv, keep in zip(d, a, kept, strict=True)]
    return diagonal(losses, [-adv * keep for adv, keep in zip(a, kept, strict=True)])


def prime_rl(low, high, back):
    def formula(d, p, a):
        losses, slopes = [], []
        for x, logp, adv in zip(d, p, a, strict=True):
            moved = math.exp(logp) - min(math.exp(logp - x), 1.0)
            kept = -back <= moved <= high if adv > 0 else -low <= moved <= back
            loss = -adv * math.exp(x) if kept else 0.0
            losses.append(loss + 1e-3 * x * x)
            slopes.append(loss + 2e-3 * x)
        return diagonal(losses, slopes)

    return formula


TRAINERS = {
    "opmd": opmd,
    "rec": rec(one_side),
    "rec_ring": rec(ring),
    "cfpo": cfpo,
    "sppo_token": sppo,
    "prime_rl": prime_rl(0.2, 0.2, math.inf),
    "prime_rl_ipo": prime_rl(0.1, 0.1, 0.1),
}
