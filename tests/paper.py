"""The methods' formulas typed out on Python floats: no tensors, no code of the package.

A method takes one span: the log ratios d, the log-probs and the advantages of its valid tokens, as lists. It returns a list
with (l_t, {j: d l_t / d logp_j}) for each token t.
"""

from math import exp, inf, log, sqrt


def clip(x, low, high):
    return min(max(x, low), high)


def surrogate(ratio, low, high, dual, a):
    """(loss, the factor of d ratio / d log ratio): Schulman 2017 eq. 7, Ye 2020 eq. 5."""
    loss = max(-a * ratio, -a * clip(ratio, low, high))
    if a < 0:
        loss = min(loss, -a * dual)
    active = ratio <= high if a > 0 else low <= ratio <= dual
    return loss, -a * ratio if active else 0.0


def ppo(d, logp, adv, low=0.8, high=1.2, dual=inf):
    out = []
    for t, (x, a) in enumerate(zip(d, adv, strict=True)):
        loss, slope = surrogate(exp(clip(x, -20, 20)), low, high, dual, a)
        out.append((loss, {t: slope if abs(x) <= 20 else 0.0}))
    return out


def dapo(d, logp, adv):
    return ppo(d, logp, adv, high=1.28)


def gspo(d, logp, adv, low=1 - 3e-4, high=1 + 4e-4):
    n = len(d)
    s = exp(sum(d) / n)
    rows = [surrogate(s, low, high, inf, a) for a in adv]
    return [(loss, {j: slope / n for j in range(n)}) for loss, slope in rows]


def gspo_token(d, logp, adv, low=1 - 3e-4, high=1 + 4e-4):
    mean = sum(d) / len(d)
    out = []
    for t, a in enumerate(adv):
        loss, slope = surrogate(exp(min(mean, 10)), low, high, inf, a)
        out.append((loss, {t: slope if mean <= 10 else 0.0}))
    return out


def cispo(d, logp, adv):
    out = []
    for t, (x, a) in enumerate(zip(d, adv, strict=True)):
        weight = min(exp(clip(x, -20, 20)), 5.0)
        out.append((-weight * a * logp[t], {t: -weight * a}))
    return out


def minpro(d, logp, adv):
    out = []
    for t, a in enumerate(adv):
        smallest_before = 1.0
        for j in range(t):
            smallest_before = exp(d[j]) if j == 0 else min(smallest_before, exp(d[j]))
        weight = clip(smallest_before * exp(d[t]), 0, 1 + 4)
        out.append((-weight * a * logp[t], {t: -weight * a}))
    return out


def sapo(d, logp, adv):
    out = []
    for t, (x, a) in enumerate(zip(d, adv, strict=True)):
        ratio, tau = exp(x), 1.0 if a > 0 else 1.05
        p = 1 / (1 + exp(-tau * (ratio - 1)))
        out.append((-4 / tau * p * a, {t: -a * ratio * 4 * p * (1 - p)}))
    return out


def _ctpo(k, width, a):
    """The band is in log space and widens with the position, the dual clip with it."""
    low, high, dual = -0.025 * width, 0.05 * width, 0.05 * width
    loss, slope = surrogate(exp(min(k, 10)), exp(low), exp(high), exp(dual), a)
    return loss, slope if k <= 10 else 0.0


def ctpo(d, logp, adv):
    out, k = [], 0.0
    for t, a in enumerate(adv):
        k += clip(d[t], -20, 20)
        loss, slope = _ctpo(k, sqrt(t + 1), a)
        out.append((loss, {t: slope}))
    return out


def ctpo_geomean(d, logp, adv):
    out, k = [], 0.0
    for t, a in enumerate(adv):
        k += clip(d[t], -20, 20)
        loss, slope = _ctpo(k / (t + 1), 1 / sqrt(t + 1), a)
        out.append((loss, {t: slope}))
    return out


def kl_k1(d, logp, adv):
    return [(x, {t: 1.0}) for t, x in enumerate(d)]


def kl_k2(d, logp, adv):
    return [(x * x / 2, {t: x}) for t, x in enumerate(d)]


def kl_k3(d, logp, adv):
    return [(exp(-x) + x - 1, {t: 1 - exp(-x)}) for t, x in enumerate(d)]


def kl_k1_unbiased(d, logp, adv):
    return [(x, {t: x}) for t, x in enumerate(d)]


def kl_k3_unbiased(d, logp, adv):
    return [(exp(-x) + x - 1, {t: x}) for t, x in enumerate(d)]


METHODS = {
    "ppo": ppo, "grpo": ppo, "dr_grpo": ppo, "dapo": dapo, "gspo": gspo, "gspo_token": gspo_token, "cispo": cispo,
    "sapo": sapo, "ctpo": ctpo, "ctpo_geomean": ctpo_geomean, "minpro": minpro, "kl_k1": kl_k1, "kl_k2": kl_k2,
    "kl_k3": kl_k3, "kl_k1_unbiased": kl_k1_unbiased, "kl_k3_unbiased": kl_k3_unbiased,
}  # fmt: skip
DEFAULT_MODE = {
    "ppo": "token-mean", "grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm", "dapo": "token-mean",
    "gspo": "seq-mean-token-mean", "gspo_token": "seq-mean-token-mean", "cispo": "token-mean", "sapo": "seq-mean-token-mean",
    "ctpo": "seq-mean-token-mean", "ctpo_geomean": "seq-mean-token-mean", "minpro": "token-mean",
}  # fmt: skip


def row_weights(mode, lengths, advantages, groups, width):
    """The weight of each token of row i, from the rows' valid lengths: section by section of the papers."""
    rows = [i for i, n in enumerate(lengths) if n > 0]
    tokens, out = sum(lengths), [0.0] * len(lengths)
    prompts = sorted({groups[i] for i in rows})
    for i in rows:
        own = [j for j in rows if groups[j] == groups[i]]
        if mode == "token-mean":
            out[i] = 1 / tokens
        elif mode == "token-sum":
            out[i] = 1.0
        elif mode == "seq-mean-token-mean":
            out[i] = 1 / (len(rows) * lengths[i])
        elif mode == "seq-mean-token-sum":
            out[i] = 1 / len(rows)
        elif mode == "seq-mean-token-sum-norm":
            out[i] = 1 / (len(rows) * width)
        elif mode == "group-mean":
            out[i] = 1 / (len(prompts) * sum(lengths[j] for j in own))
        elif mode == "balanced" and advantages[i] != 0:
            signed = [j for j in own if advantages[j] != 0]
            same = [j for j in signed if (advantages[j] > 0) == (advantages[i] > 0)]
            out[i] = len(same) / len(signed) / sum(lengths[j] for j in same) / len(prompts)
    return out


def total(method, rows, weights, width):
    """(loss, gradient [rows][width]). rows: per row a list of spans, each (cells, d, logp, adv) with the tokens' columns."""
    loss, grad = 0.0, [[0.0] * width for _ in rows]
    for i, spans in enumerate(rows):
        for cells, d, logp, adv in spans:
            for value, slopes in method(d, logp, adv):
                loss += weights[i] * value
                for j, slope in slopes.items():
                    grad[i][cells[j]] += weights[i] * slope
    return loss, grad


def entropy_and_logp(logits, index, temperature):
    """(log-prob of one index, entropy) of a list of logits, and their gradients, by the definition."""
    z = [x / temperature for x in logits]
    lse = log(sum(exp(x) for x in z))
    p = [exp(x - lse) for x in z]
    entropy = -sum(q * log(q) for q in p)
    grad_logp = [((v == index) - q) / temperature for v, q in enumerate(p)]
    grad_entropy = [-q * (log(q) + entropy) / temperature for q in p]
    return z[index] - lse, entropy, grad_logp, grad_entropy
