"""Links: what a preference objective makes of the scores of a pair, or of one labelled sequence.

A score x is a sequence's log-prob, or its log ratio to a reference, summed or a mean over its tokens. Every link gives
its loss and, on the next line, the derivative in each score; all arguments are fp64, [P] of pairs or [S] of sequences.
sigma is the logistic function, log sigma its logarithm.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..batch.checks import check_number
from .gates.base import Range, check_params, parametrised

Slopes = tuple[Tensor, Tensor, Tensor]  # loss, its derivative in the chosen score and in the rejected one


@parametrised
class Link:
    """Base of all links. beta: the temperature of the scores; beta times a score is its reward."""

    names: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]
    ranges: ClassVar[Mapping[str, Range]]
    __dataclass_fields__: ClassVar[dict[str, Any]]
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_params(self)
        check_number("beta", self.beta, above=0)

    def of(self, chosen: Tensor, rejected: Tensor) -> Slopes:
        raise TypeError(f"{type(self).__name__} is no link of pairs: it defines no of")


@parametrised
class MarginLink(Link):
    """Of the difference d = x_w - x_l alone."""

    def of(self, chosen: Tensor, rejected: Tensor) -> Slopes:
        value, slope = self.of_margin(chosen - rejected)
        return value, slope, -slope

    def of_margin(self, d: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} is no link: it defines no of_margin")


@parametrised
class Sigmoid(MarginLink):
    """-(1 - e) log sigma(u) - e log sigma(-u), u = beta d - gamma, e the label smoothing."""

    label_smoothing: float = 0.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("label_smoothing", self.label_smoothing, 0, 1)

    def of_margin(self, d: Tensor) -> tuple[Tensor, Tensor]:
        e, u = self.label_smoothing, self.beta * d - self.gamma
        value = -(1 - e) * logsigmoid(u) - e * logsigmoid(-u) if e else -logsigmoid(u)
        return value, self.beta * (u.sigmoid() - (1 - e))


@parametrised
class AlphaPo(Sigmoid):
    """The sigmoid link of (1 - exp(-alpha x)) / alpha, which is x as alpha falls to 0."""

    alpha: float = 0.25

    def of(self, chosen: Tensor, rejected: Tensor) -> Slopes:
        power_chosen, power_rejected = (-self.alpha * chosen).exp(), (-self.alpha * rejected).exp()
        value, slope = self.of_margin((power_rejected - power_chosen) / self.alpha)
        return value, slope * power_chosen, -slope * power_rejected


@parametrised
class Hinge(MarginLink):
    """max(0, 1 - beta d)."""

    def of_margin(self, d: Tensor) -> tuple[Tensor, Tensor]:
        value = (1 - self.beta * d).relu()
        return value, -self.beta * (value > 0).to(d.dtype)


@parametrised
class Squared(MarginLink):
    """(d - 1 / (2 beta))^2."""

    def of_margin(self, d: Tensor) -> tuple[Tensor, Tensor]:
        distance = d - 1 / (2 * self.beta)
        return distance**2, 2 * distance


@parametrised
class Robust(MarginLink):
    """(-(1 - e) log sigma(u) + e log sigma(-u)) / (1 - 2 e), u = beta d: unbiased where labels are flipped with
    probability e < 1/2."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(
            "label_smoothing", self.label_smoothing, 0, math.nextafter(0.5, 0), accepted="a number in [0, 0.5)"
        )

    def of_margin(self, d: Tensor) -> tuple[Tensor, Tensor]:
        e, u = self.label_smoothing, self.beta * d
        value = (e * logsigmoid(-u) - (1 - e) * logsigmoid(u)) / (1 - 2 * e)
        return value, -self.beta * ((1 - e) * (-u).sigmoid() + e * u.sigmoid()) / (1 - 2 * e)


@parametrised
class Exo(MarginLink):
    """D(q || (1 - e, e)), q = (sigma(u), sigma(-u)), u = beta d, e the label smoothing, 0 < e < 1."""

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        accepted = "a number above 0 and below 1"
        check_number("label_smoothing", self.label_smoothing, 0, math.nextafter(1, 0), above=0, accepted=accepted)

    def of_margin(self, d: Tensor) -> tuple[Tensor, Tensor]:
        e, u = self.label_smoothing, self.beta * d
        q, rest = u.sigmoid(), (-u).sigmoid()
        value = q * (logsigmoid(u) - math.log1p(-e)) + rest * (logsigmoid(-u) - math.log(e))
        return value, self.beta * q * rest * (u - math.log1p(-e) + math.log(e))


@parametrised
class Discopop(MarginLink):
    """-(1 - m) log sigma(u) + m e^-u, u = beta d, m = sigma(u / tau)."""

    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau, above=0)

    def of_margin(self, d: Tensor) -> tuple[Tensor, Tensor]:
        u = self.beta * d
        m, blended = (u / self.tau).sigmoid(), (logsigmoid(u / self.tau) - u).exp()  # m e^-u, where that is 0 inf too
        value = blended - (1 - m) * logsigmoid(u)
        slope = (1 - m) / self.tau * (blended + m * logsigmoid(u)) - blended - (1 - m) * (-u).sigmoid()
        return value, self.beta * slope


@parametrised
class Nca(Link):
    """-log sigma(a) - (log sigma(-a) + log sigma(-b)) / 2, a = beta x_w, b = beta x_l."""

    def of(self, chosen: Tensor, rejected: Tensor) -> Slopes:
        a, b = self.beta * chosen, self.beta * rejected
        value = -logsigmoid(a) - (logsigmoid(-a) + logsigmoid(-b)) / 2
        return value, self.beta * (a.sigmoid() / 2 - (-a).sigmoid()), self.beta * b.sigmoid() / 2


@parametrised
class Bco(Link):
    """-log sigma(a) - log sigma(-b), a = beta x_w, b = beta x_l."""

    def of(self, chosen: Tensor, rejected: Tensor) -> Slopes:
        a, b = self.beta * chosen, self.beta * rejected
        value = -logsigmoid(a) - logsigmoid(-b)
        return value, -self.beta * (-a).sigmoid(), self.beta * b.sigmoid()


@parametrised
class Sppo(Link):
    """(x_w - 1 / (2 beta))^2 + (x_l + 1 / (2 beta))^2."""

    def of(self, chosen: Tensor, rejected: Tensor) -> Slopes:
        won, lost = chosen - 1 / (2 * self.beta), rejected + 1 / (2 * self.beta)
        return won**2 + lost**2, 2 * won, 2 * lost


@parametrised
class ApoZero(Link):
    """1 - sigma(beta x_w) + sigma(beta x_l): raises the chosen, lowers the rejected."""

    def of(self, chosen: Tensor, rejected: Tensor) -> Slopes:
        a, b = (self.beta * chosen).sigmoid(), (self.beta * rejected).sigmoid()
        return 1 - a + b, -self.beta * a * (1 - a), self.beta * b * (1 - b)


@parametrised
class ApoDown(Link):
    """sigma(beta x_w) + 1 - sigma(beta (x_w - x_l)): lowers both, the rejected more."""

    def of(self, chosen: Tensor, rejected: Tensor) -> Slopes:
        a, d = (self.beta * chosen).sigmoid(), (self.beta * (chosen - rejected)).sigmoid()
        return a + 1 - d, self.beta * (a * (1 - a) - d * (1 - d)), self.beta * d * (1 - d)


@parametrised
class OddsRatio(Link):
    """-beta log sigma(o_w - o_l), o = x - log(1 - e^x) the log odds of a mean log-prob x < 0; singular at 0."""

    def of(self, chosen: Tensor, rejected: Tensor) -> Slopes:
        u = chosen - _log1mexp(chosen) - rejected + _log1mexp(rejected)
        value, slope = -self.beta * logsigmoid(u), -self.beta * (-u).sigmoid()
        return value, -slope / chosen.expm1(), slope / rejected.expm1()


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x), x < 0, without cancellation."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


@parametrised
class OfLabels(Link):
    """Base of the links of one labelled sequence. compared: the argument that its score is compared with, or ""."""

    compared: ClassVar[str] = ""

    def of_labelled(self, x: Tensor, desirable: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} is no link of labels: it defines no of_labelled")


@parametrised
class Kto(OfLabels):
    """Of one sequence: w_D (1 - sigma(v)) where it is desirable, w_U sigma(v) where not, v = beta (x - kl)."""

    compared = "kl"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def of_labelled(self, x: Tensor, desirable: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        s, (good, bad) = (self.beta * (x - base)).sigmoid(), (self.desirable_weight, self.undesirable_weight)
        value, slope = torch.where(desirable, good * (1 - s), bad * s), self.beta * s * (1 - s)
        return value, torch.where(desirable, -good * slope, bad * slope)


@parametrised
class ApoZeroUnpaired(Kto):
    """Kto's with kl = 0."""

    compared = ""


@parametrised
class BcoUnpaired(OfLabels):
    """Of one sequence: -log sigma(v) where it is desirable, -log sigma(-v) where not, v = beta x - reward_shift."""

    compared = "reward_shift"

    def of_labelled(self, x: Tensor, desirable: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        beta = torch.where(desirable, 1.0, -1.0).to(x.dtype) * self.beta  # in fp32 it would be rounded
        return -logsigmoid(beta * (x - base)), -beta * (beta * (base - x)).sigmoid()


@parametrised
class Score:
    """f'(e^x) of an f-divergence at a log ratio x, with its derivative: here x itself, of the reverse KL."""

    names: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]
    ranges: ClassVar[Mapping[str, Range]]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.ones_like(x)


@parametrised
class ForwardKlScore(Score):
    """1 - e^-x."""

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return -(-x).expm1(), (-x).exp()


@parametrised
class JsScore(Score):
    """log 2 + log sigma(x)."""

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return math.log(2) + logsigmoid(x), (-x).sigmoid()


@parametrised
class AlphaScore(Score):
    """(e^((alpha - 1) x) - 1) / (alpha - 1), x where alpha is 1."""

    alpha: float = 0.5

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.alpha == 1:
            return x, torch.ones_like(x)
        power = (self.alpha - 1) * x
        return power.expm1() / (self.alpha - 1), power.exp()
