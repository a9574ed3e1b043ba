"""Gates that bound a ratio (see base.py)."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ...batch.checks import check_name
from .base import (
    DUAL,
    INF,
    POSITIVE,
    WIDTH,
    Bound,
    Bounds,
    Gate,
    as_tensor_like,
    bounded,
    parametrised,
    product,
    surrogate,
    used,
)


@parametrised
class Ratio(Gate):
    """l = -A r: the importance-weighted policy gradient, nothing bounded."""

    name = "ratio"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return product(-advantages, s.exp())


@parametrised
class PpoClip(Gate):
    """l = max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)); A < 0: l <= -A dual.   r = exp(s)

    Ratio space. dual > 1; inf turns it off.

    Source: PPO, arXiv 1707.06347 eq. 7; dual clip, arXiv 1912.09729 eq. 5.
    """

    name = "ppo_clip"
    ranges = {"eps_low": WIDTH, "eps_high": WIDTH, "dual": DUAL}
    eps_low: Bound = 0.2
    eps_high: Bound = 0.2
    dual: Bound = INF

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return surrogate(s, 1 - self.eps_low, 1 + self.eps_high, self.dual, advantages)

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        ratio, negative = s.exp(), advantages < 0
        low, high = ratio < 1 - self.eps_low, ratio > 1 + self.eps_high
        return negative & low, (advantages > 0) & high, negative & (ratio > self.dual)


@parametrised
class PpoNtp(PpoClip):
    """l = PPO's - ntp logp: tokens that reinforcement trains beside tokens that are only to be predicted.

    RMT has L = L_RL + lambda L_NTP, lambda = 0.1, the next-token loss on the tokens that reinforcement leaves out. ntp
    is lambda on these tokens and 0 on the others; the advantages of these tokens are 0. ntp_reduction: "mean", under
    the loss's own weights (our reading), or "sum", the plain sum over the tokens that the notes have.

    Source: RMT, arXiv 2509.24375 (notes).
    """

    name = "ppo_ntp"
    vanishes = False
    slopes = ("s", "logp")
    ntp: Bound = 0.0
    ntp_reduction: str = "mean"

    def __post_init__(self) -> None:
        check_name("ntp_reduction", self.ntp_reduction, ("mean", "sum"))

    def params(self) -> tuple[Bound, ...]:
        return self.eps_low, self.eps_high, self.dual, self.ntp

    def weighed(self, weights: Callable[[], Tensor]) -> "PpoNtp":
        if self.ntp_reduction == "mean":
            return self
        w = weights()
        return dataclasses.replace(self, ntp=torch.where(w > 0, self.ntp / w, 0), ntp_reduction="mean")

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return PpoClip.value(self, s, x, logp, advantages, t) - product(self.ntp, logp)


@parametrised
class LogBand(Gate):
    """Position-adaptive clip in log space: width u = t^power, band [-eps_low u, eps_high u].

    l = max(-A e^s, -A e^clip(s, -eps_low u, eps_high u)); A < 0: l <= -A e^(eps_dual u). eps_dual = inf turns the dual
    clip off.

    Source: CTPO, arXiv 2605.07331, cum-token-*-la (authors' code, verified).
    """

    name = "log_band"
    ranges = {"eps_low": WIDTH, "eps_high": WIDTH, "eps_dual": WIDTH}
    eps_low: Bound = 0.025
    eps_high: Bound = 0.05
    eps_dual: Bound = 0.05
    power: Bound = 0.5

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        width = t**self.power
        bounds = (-self.eps_low * width, self.eps_high * width, self.eps_dual * width)
        outside, bound = bounded(s, *bounds, advantages)
        return product(-advantages, torch.where(outside, bound, s).exp())

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        width, negative = t**self.power, advantages < 0
        low, high = s < -self.eps_low * width, s > self.eps_high * width
        return negative & low, (advantages > 0) & high, negative & (s > self.eps_dual * width)


@parametrised
class Sapo(Gate):
    """l = -(4 / tau) sigmoid(tau (r - 1)) A, tau = tau_pos where A > 0, else tau_neg.

    Source: SAPO, arXiv 2511.20347; TRL, verl, ms-swift, SkyRL, AReaL and Liger agree (trainers, verified).
    """

    name = "sapo"
    ranges = {"tau_pos": POSITIVE, "tau_neg": POSITIVE}
    tau_pos: Bound = 1.0
    tau_neg: Bound = 1.05

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        tau_pos, tau_neg = (as_tensor_like(tau, s) for tau in self.params())
        tau = torch.where(advantages > 0, tau_pos, tau_neg)
        # Beyond e^80 the sigmoid is flat: no 0 inf.
        return -4 / tau * torch.sigmoid(tau * (s.clamp(max=80).exp() - 1)) * advantages


@parametrised
class Cfpo(Gate):
    """l = -A r + |A| / (2 eps) (r - 1)^2: no clip; the parabola turns where PPO's clip begins, at r = 1 + eps sign(A),
    and no token is ever without a gradient.

    Source: Simple Policy Optimization, arXiv 2401.16025; for language models CFPO, arXiv 2601.22801 eq. 7, as two
    re-implementations quote it (notes, trainers).
    """

    name = "cfpo"
    ranges = {"eps": POSITIVE}
    eps: Bound = 0.2

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        # Around the vertex: of an infinite ratio -A r and the square would be opposite infinities.
        from_vertex = s.exp() - 1 - self.eps * advantages.sign()
        return product(advantages.abs() / (2 * self.eps), from_vertex.square()) - self._at_vertex(advantages)

    def _at_vertex(self, advantages: Tensor) -> Tensor:
        return advantages + advantages.abs() * self.eps / 2


@parametrised
class SppoToken(Gate):
    """l = -A s where r = e^s lies in [1 / (1 + eps), 1 + eps], else 0. clip_low, clip_high: of either sign of A.

    Source: arXiv 2108.05828, Trinity-RFT sppo (trainers).
    """

    name = "sppo_token"
    ranges = {"eps": WIDTH}
    eps: Bound = 0.3

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        low, high, _ = self.clipped(s, x, logp, advantages, t)
        return product(-advantages, torch.where(low | high, 0, s))

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        ratio = s.exp()
        return ratio < 1 / (1 + self.eps), ratio > 1 + self.eps, torch.zeros_like(s, dtype=torch.bool)


@parametrised
class PrimeRl(Gate):
    """l = -A r of the tokens that are kept, else 0; + kl_tau s^2 of all.   r = exp(s)

    Dropped by how far the token's probability has moved, p - mu, p = e^logp and mu = e^(logp - s): A > 0 above eps_high
    and below -eps_back, A <= 0 below -eps_low and above eps_back. eps_back: the bound of a move that the advantage does
    not ask for; inf turns it off. The gradient is through r; the choice of tokens has none. prime-rl's adv_tau is a
    factor of the advantages.

    Source: prime-rl, its default loss and "ipo" (trainers).
    """

    name = "prime_rl"
    ranges = {"eps_low": WIDTH, "eps_high": WIDTH, "eps_back": WIDTH, "kl_tau": WIDTH}
    vanishes = False
    eps_low: Bound = 0.2
    eps_high: Bound = 0.2
    eps_back: Bound = INF
    kl_tau: Bound = 1e-3

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        low, high, _ = self.clipped(s.detach(), x, logp.detach(), advantages, t)
        silent = low | high | (advantages == 0)  # there the ratio has no part, were it infinite
        kept = torch.where(silent, 0, -advantages) * torch.where(silent, 0, s).exp()
        return kept + self.kl_tau * used(self.kl_tau, s).square()

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        low, high, back, _ = (as_tensor_like(bound, s) for bound in self.params())
        moved, positive = logp.exp().clamp(max=1) - (logp - s).exp().clamp(max=1), advantages > 0
        below, above = moved < -torch.where(positive, back, low), moved > torch.where(positive, high, back)
        return below, above, torch.zeros_like(below)


@parametrised
class Identity(Gate):
    """l = logp: what the aggregation of a hand-written loss needs."""

    name = "identity"
    uses_advantages = False
    slopes = ("logp",)

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return logp
