"""One function per link and per score of preference objectives, in fp64: tokenrl/objectives/links.py and scores.py.

link(chosen, rejected, desirable, *parameters) -> value, by_chosen, by_rejected
score(x, parameter) -> value, by_x
Blocks of losses and of sequences; parameters by the names and in the order of the Python class. Of a labelled sequence
rejected is what its score is compared with, a constant. Each derivative stands on the line after its value.
"""

import triton
import triton.language as tl

from .scalar import expm1_of

LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def logistic(x):
    small = tl.exp(-tl.abs(x))  # the one that does not overflow
    return tl.where(x < 0, small, 1.0) / (1 + small)


@triton.jit
def log1p(x):
    """log(1 + x), x > -1: what rounding 1 + x has lost is given back as a factor."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def log_logistic(x):
    return tl.where(x < 0, x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def log_one_minus_exponential(x):
    """log(1 - e^x), x < 0, without cancellation."""
    return tl.where(x > -LOG_2, tl.log(-expm1_of(x)), log1p(-tl.exp(x)))


@triton.jit
def used(factor, x):
    """Their product, 0 where the factor is, whatever x is."""
    return tl.where(factor == 0, 0.0, factor * x)


@triton.jit
def sigmoid(chosen, rejected, desirable, beta, label_smoothing, gamma):
    u = beta * (chosen - rejected) - gamma
    value = -used(1 - label_smoothing, log_logistic(u)) - used(label_smoothing, log_logistic(-u))
    slope = beta * (logistic(u) - (1 - label_smoothing))
    return value, slope, -slope


@triton.jit
def alphapo(chosen, rejected, desirable, beta, label_smoothing, gamma, alpha):
    won, lost = tl.exp(-alpha * chosen), tl.exp(-alpha * rejected)
    value, slope, _ = sigmoid(lost / alpha, won / alpha, desirable, beta, label_smoothing, gamma)
    return value, slope * won, -slope * lost


@triton.jit
def hinge(chosen, rejected, desirable, beta):
    value = 1 - beta * (chosen - rejected)
    slope = tl.where(value > 0, -beta, 0.0)
    return tl.where(value < 0, 0.0, value), slope, -slope


@triton.jit
def squared(chosen, rejected, desirable, beta):
    distance = chosen - rejected - 1 / (2 * beta)
    return distance * distance, 2 * distance, -2 * distance


@triton.jit
def robust(chosen, rejected, desirable, beta, label_smoothing):
    e, u, scale = label_smoothing, beta * (chosen - rejected), 1 - 2 * label_smoothing
    value = (e * log_logistic(-u) - (1 - e) * log_logistic(u)) / scale
    slope = -beta * ((1 - e) * logistic(-u) + e * logistic(u)) / scale
    return value, slope, -slope


@triton.jit
def exo(chosen, rejected, desirable, beta, label_smoothing):
    u = beta * (chosen - rejected)
    q, rest, kept, flipped = logistic(u), logistic(-u), log1p(-label_smoothing), tl.log(label_smoothing)
    value = q * (log_logistic(u) - kept) + rest * (log_logistic(-u) - flipped)
    slope = beta * q * rest * (u - kept + flipped)
    return value, slope, -slope


@triton.jit
def discopop(chosen, rejected, desirable, beta, tau):
    u = beta * (chosen - rejected)
    m, log_u = logistic(u / tau), log_logistic(u)
    blended = tl.exp(log_logistic(u / tau) - u)  # m e^-u, where that is 0 inf too
    value = blended - (1 - m) * log_u
    slope = beta * ((1 - m) / tau * (blended + m * log_u) - blended - (1 - m) * logistic(-u))
    return value, slope, -slope


@triton.jit
def nca(chosen, rejected, desirable, beta):
    a, b = beta * chosen, beta * rejected
    value = -log_logistic(a) - (log_logistic(-a) + log_logistic(-b)) / 2
    return value, beta * (logistic(a) / 2 - logistic(-a)), beta * logistic(b) / 2


@triton.jit
def bco(chosen, rejected, desirable, beta):
    a, b = beta * chosen, beta * rejected
    value = -log_logistic(a) - log_logistic(-b)
    return value, -beta * logistic(-a), beta * logistic(b)


@triton.jit
def sppo(chosen, rejected, desirable, beta):
    won, lost = chosen - 1 / (2 * beta), rejected + 1 / (2 * beta)
    value = won * won + lost * lost
    return value, 2 * won, 2 * lost


@triton.jit
def apo_zero(chosen, rejected, desirable, beta):
    a, b = logistic(beta * chosen), logistic(beta * rejected)
    value = 1 - a + b
    return value, -beta * a * (1 - a), beta * b * (1 - b)


@triton.jit
def apo_down(chosen, rejected, desirable, beta):
    a, d = logistic(beta * chosen), logistic(beta * (chosen - rejected))
    value = a + 1 - d
    return value, beta * (a * (1 - a) - d * (1 - d)), beta * d * (1 - d)


@triton.jit
def odds_ratio(chosen, rejected, desirable, beta):
    u = chosen - log_one_minus_exponential(chosen) - rejected + log_one_minus_exponential(rejected)
    value, slope = -beta * log_logistic(u), beta * logistic(-u)
    return value, slope / expm1_of(chosen), -slope / expm1_of(rejected)


@triton.jit
def kto(chosen, rejected, desirable, beta, desirable_weight, undesirable_weight):
    s = logistic(beta * (chosen - rejected))
    value = tl.where(desirable, desirable_weight * (1 - s), undesirable_weight * s)
    slope = tl.where(desirable, -desirable_weight, undesirable_weight) * beta * s * (1 - s)
    return value, slope, 0.0 * slope


@triton.jit
def bco_unpaired(chosen, rejected, desirable, beta):
    sign = tl.where(desirable, 1.0, -1.0)
    v = sign * beta * (chosen - rejected)
    value = -log_logistic(v)
    slope = -sign * beta * logistic(-v)
    return value, slope, 0.0 * slope


LINKS = {
    "sigmoid": sigmoid, "alphapo": alphapo, "hinge": hinge, "squared": squared, "robust": robust, "exo": exo,
    "discopop": discopop, "nca": nca, "bco": bco, "sppo": sppo, "apo_zero": apo_zero, "apo_down": apo_down,
    "odds_ratio": odds_ratio, "kto": kto, "apo_zero_unpaired": kto, "bco_unpaired": bco_unpaired,
}  # fmt: skip


@triton.jit
def reverse_kl(x, parameter):
    value = x
    return value, 1.0


@triton.jit
def forward_kl(x, parameter):
    value = -expm1_of(-x)
    return value, tl.exp(-x)


@triton.jit
def js(x, parameter):
    value = LOG_2 + log_logistic(x)
    return value, logistic(-x)


@triton.jit
def alpha(x, parameter):
    power = (parameter - 1) * x
    value = tl.where(parameter == 1, x, expm1_of(power) / tl.where(parameter == 1, 1.0, parameter - 1))
    return value, tl.exp(power)


SCORES = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "js": js, "alpha": alpha}
