"""THE definition of each gate: its parameters, its formula, its source, and its value in torch.

A gate turns the statistic `s` (a log ratio) of one token into that token's loss:

    value(s, logp, advantages, t) -> l        differentiable in s and logp
    clipped(s, logp, advantages, t) -> low, high, dual      which bound is active (bool), for the metrics

t is the position: the 1-based count of valid tokens in the statistic's span. All arguments broadcast; parameters are
numbers or tensors with one value per token. Derivatives are autograd's here, hand-written in csrc/gates.h and
triton_kernels/gates.py. The kernels' own tensors never hold gradients for parameters.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .errors import unknown, wrong

Bound = float | Tensor
INF = float("inf")
LOG_FLOOR = math.log(1e-8)


def parametrised(cls):
    """A frozen dataclass that knows its parameters' names where torch.compile traces (dataclasses.fields does not)."""
    cls = dataclass(frozen=True, eq=False)(cls)
    cls.names = tuple(field.name for field in dataclasses.fields(cls))
    return cls


@parametrised
class Gate:
    """Base of all gates. `name` finds the kernels' functor; `params()` are its parameters in the functor's order.

    uses_advantages: the loss depends on them; vanishes: it is then 0, with its gradient, wherever they are 0."""

    name: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    uses_advantages: ClassVar[bool] = True
    vanishes: ClassVar[bool] = True

    def params(self) -> tuple[Bound, ...]:
        return tuple(getattr(self, name) for name in self.names)

    def value(self, s: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is no gate: it defines no value")

    def clipped(self, s: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        never = torch.zeros_like(s, dtype=torch.bool)
        return never, never, never


def _surrogate(ratio: Tensor, clipped: Tensor, ceiling: Bound, advantages: Tensor) -> Tensor:
    """max(-A r, -A clip(r)), and for A < 0 at most -A ceiling (dual clip)."""
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return torch.minimum(loss, torch.where(advantages < 0, -advantages * ceiling, INF))


def _clamp(x: Tensor, low: Bound, high: Bound) -> Tensor:
    return torch.minimum(torch.maximum(x, torch.as_tensor(low, dtype=x.dtype)), torch.as_tensor(high, dtype=x.dtype))


@parametrised
class PpoClip(Gate):
    """l = max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high)); A < 0: l <= -A dual.   r = exp(s)

    PPO, arXiv 1707.06347 eq. 7; dual clip, arXiv 1912.09729 eq. 5 (dual > 1; inf turns it off). Ratio space.
    """

    name = "ppo_clip"
    eps_low: Bound = 0.2
    eps_high: Bound = 0.2
    dual: Bound = INF

    def value(self, s, logp, advantages, t):
        ratio = s.exp()
        return _surrogate(ratio, _clamp(ratio, 1 - self.eps_low, 1 + self.eps_high), self.dual, advantages)

    def clipped(self, s, logp, advantages, t):
        ratio, negative = s.exp(), advantages < 0
        low, high = ratio < 1 - self.eps_low, ratio > 1 + self.eps_high
        return negative & low, (advantages > 0) & high, negative & (ratio > self.dual)


@parametrised
class LogBand(Gate):
    """Position-adaptive clip in log space: width u = t^power, band [-eps_low u, eps_high u].

    l = max(-A e^s, -A e^clip(s, -eps_low u, eps_high u)); A < 0: l <= -A e^(eps_dual u).
    CTPO, arXiv 2605.07331, and the authors' code (cum-token-*-la) [C][V]. eps_dual = inf turns the dual clip off.
    """

    name = "log_band"
    eps_low: Bound = 0.025
    eps_high: Bound = 0.05
    eps_dual: Bound = 0.05
    power: Bound = 0.5

    def value(self, s, logp, advantages, t):
        width = t**self.power
        ceiling = torch.exp(self.eps_dual * width)
        return _surrogate(s.exp(), _clamp(s, -self.eps_low * width, self.eps_high * width).exp(), ceiling, advantages)

    def clipped(self, s, logp, advantages, t):
        width, negative = t**self.power, advantages < 0
        low, high = s < -self.eps_low * width, s > self.eps_high * width
        return negative & low, (advantages > 0) & high, negative & (s > self.eps_dual * width)


@parametrised
class Cispo(Gate):
    """l = -sg[clip(r, low, high)] A logp: no token is dropped, its weight is bounded.

    CISPO, MiniMax-M1, arXiv 2506.13585 [T]. bound="raw": low = eps_low, high = eps_high are the bounds themselves
    (TRL, Liger, ms-swift); bound="relative": low = 1 - eps_low, high = 1 + eps_high (verl, slime, NeMo-RL).
    eps_low=None: no lower bound. clip_high counts tokens of either sign of A, as verl does; TRL counts A > 0 only.
    """

    name = "cispo"
    eps_low: Bound | None = None
    eps_high: Bound = 5.0
    bound: str = "raw"

    def __post_init__(self):
        if self.bound not in ("raw", "relative"):
            raise unknown("bound", self.bound, ("raw", "relative"))

    def params(self):
        low = 0.0 if self.eps_low is None else self.eps_low
        if self.bound == "raw":
            return low, self.eps_high
        return 0.0 if self.eps_low is None else 1 - low, 1 + self.eps_high

    def value(self, s, logp, advantages, t):
        return -_clamp(s.exp(), *self.params()).detach() * advantages * logp

    def clipped(self, s, logp, advantages, t):
        ratio, (low, high) = s.exp(), self.params()
        return ratio < low, ratio > high, torch.zeros_like(ratio, dtype=torch.bool)


@parametrised
class Sapo(Gate):
    """l = -(4 / tau) sigmoid(tau (r - 1)) A, tau = tau_pos where A > 0, else tau_neg.

    SAPO, arXiv 2511.20347; TRL, verl, ms-swift, SkyRL, AReaL and Liger agree [T][V].
    """

    name = "sapo"
    tau_pos: Bound = 1.0
    tau_neg: Bound = 1.05

    def value(self, s, logp, advantages, t):
        tau_pos, tau_neg = (torch.as_tensor(tau, dtype=s.dtype) for tau in self.params())
        tau = torch.where(advantages > 0, tau_pos, tau_neg)
        return -4 / tau * torch.sigmoid(tau * (s.exp() - 1)) * advantages


@parametrised
class Reinforce(Gate):
    """l = -A logp: no ratio. REINFORCE; GPG, arXiv 2504.02546, is the same loss with its own advantages [T]."""

    name = "reinforce"

    def value(self, s, logp, advantages, t):
        return -advantages * logp


@parametrised
class Quadratic(Gate):
    """l = -A logp + beta / 2 s^2: a policy gradient held near the old policy by its squared log ratio.

    DRO, arXiv 2405.19107 (verl) [T]; Kimi k1.5, arXiv 2501.12599, with tau for beta (ROLL) [T].
    """

    name = "quadratic"
    vanishes = False
    beta: Bound = 1.0

    def value(self, s, logp, advantages, t):
        return -advantages * logp + self.beta / 2 * s * s


@parametrised
class Topr(Gate):
    """l = -sg[w] A logp, w = 1 where A > 0, else min(r, ceiling): only what was wrong is importance-weighted.

    TOPR, arXiv 2503.14286 [T]: the paper's ratio is the trajectory's, ROLL's the token's. clip_low: A <= 0 and r above
    the ceiling.
    """

    name = "topr"
    ceiling: Bound = 1.0

    def value(self, s, logp, advantages, t):
        weight = torch.where(advantages > 0, 1, _clamp(s.exp(), -INF, self.ceiling))
        return -weight.detach() * advantages * logp

    def clipped(self, s, logp, advantages, t):
        low = (advantages <= 0) & (s.exp() > self.ceiling)
        return low, torch.zeros_like(low), torch.zeros_like(low)


@parametrised
class Vespo(Gate):
    """l = -sg[phi(r)] A logp, phi = e^(lambda + k log r - lambda r), r the sequence's product of ratios, at least 1e-8.

    VESPO, the authors' code [C][T][V]; k, lambda of A >= 0 are k_pos, lambda_pos. phi(1) = 1, phi peaks at k / lambda.
    """

    name = "vespo"
    k_pos: Bound = 2.0
    lambda_pos: Bound = 3.0
    k_neg: Bound = 3.0
    lambda_neg: Bound = 2.0

    def value(self, s, logp, advantages, t):
        k_pos, lambda_pos, k_neg, lambda_neg = (torch.as_tensor(p, dtype=s.dtype) for p in self.params())
        k, decay = torch.where(advantages < 0, k_neg, k_pos), torch.where(advantages < 0, lambda_neg, lambda_pos)
        log_ratio = _clamp(s, LOG_FLOOR, INF)
        return -torch.exp(decay + k * log_ratio - decay * log_ratio.exp()).detach() * advantages * logp


@parametrised
class DppoGate(Gate):
    """Base of DPPO's masks, arXiv 2602.04879: l = -sg[min(r, ceiling)] A logp where the token is kept, else 0.

    p = e^logp, mu = e^(logp - s), the old policy's. Dropped: A > 0 and the divergence upwards is above eps_high, A <= 0
    and downwards above eps_low. Authors' code and verl [C][T]; the gradient is through logp alone. The paper anchors on
    the rollout's log-probs: hand them in as old_logp. clip_high, clip_low: dropped by either bound.
    """

    def divergence(self, p: Tensor, mu: Tensor, s: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is no gate: it defines no divergence")

    def _dropped(self, s, logp, advantages):
        p, mu = logp.exp().clamp(max=1), (logp - s).exp().clamp(max=1)
        far, positive = self.divergence(p, mu, s), advantages > 0
        return ~positive & (p < mu) & (far > self.eps_low), positive & (p > mu) & (far > self.eps_high)

    def value(self, s, logp, advantages, t):
        low, high = self._dropped(s.detach(), logp.detach(), advantages)
        weight = torch.where(low | high, 0, _clamp(s.exp(), -INF, self.ceiling))
        return -weight.detach() * advantages * logp

    def clipped(self, s, logp, advantages, t):
        low, high = self._dropped(s, logp, advantages)
        return low, high, torch.zeros_like(low)


@parametrised
class DppoTv(DppoGate):
    """DPPO with the total variation of taking the token or not, |p - mu|. See DppoGate."""

    name = "dppo_tv"
    eps_low: Bound = 0.15
    eps_high: Bound = 0.15
    ceiling: Bound = 20.0

    def divergence(self, p, mu, s):
        return (p - mu).abs()


@parametrised
class DppoKl(DppoGate):
    """DPPO with the KL divergence of taking the token or not, mu log(mu / p) + (1 - mu) log((1 - mu) / (1 - p)), 1e-8
    added to both of the latter. See DppoGate."""

    name = "dppo_kl"
    eps_low: Bound = 0.05
    eps_high: Bound = 0.05
    ceiling: Bound = 20.0

    def divergence(self, p, mu, s):
        return -mu * s + (1 - mu) * torch.log((1 - mu + 1e-8) / (1 - p + 1e-8))


@parametrised
class KlGate(Gate):
    """Base of the estimators of KL(pi || ref): the statistic is logp - ref_logp, so `old_logp` is the reference's."""

    uses_advantages = False


@parametrised
class KlK1(KlGate):
    """l = s. Schulman's k1: right value; as a loss its expected gradient is zero."""

    name = "kl_k1"

    def value(self, s, logp, advantages, t):
        return s


@parametrised
class KlK2(KlGate):
    """l = s^2 / 2. Schulman's k2: on-policy its gradient is that of the reverse KL."""

    name = "kl_k2"

    def value(self, s, logp, advantages, t):
        return s * s / 2


@parametrised
class KlK3(KlGate):
    """l = min(e^-s + s - 1, ceiling). Schulman's k3, non-negative; verl clamps it at ceiling = 10 (zero gradient
    above), TRL does not."""

    name = "kl_k3"
    ceiling: Bound = INF

    def value(self, s, logp, advantages, t):
        return _clamp(torch.expm1(-s) + s, -INF, self.ceiling)


def _straight_through(value: Tensor, carrier: Tensor) -> Tensor:
    return carrier + (value - carrier).detach()


@parametrised
class KlK1Unbiased(KlGate):
    """Value of k1, gradient of k2 (verl "k1+")."""

    name = "kl_k1_unbiased"

    def value(self, s, logp, advantages, t):
        return _straight_through(s, s * s / 2)


@parametrised
class KlK3Unbiased(KlGate):
    """Value of k3, gradient of k2 (verl "k3+"). With token_weight = r it is the importance-corrected k3 (DeepSeek-V3.2,
    TRL use_bias_correction_kl): value r k3, gradient r s."""

    name = "kl_k3_unbiased"
    ceiling: Bound = INF

    def value(self, s, logp, advantages, t):
        return _straight_through(_clamp(torch.expm1(-s) + s, -INF, self.ceiling), s * s / 2)


@parametrised
class Identity(Gate):
    """l = logp: what the aggregation of a hand-written loss needs."""

    name = "identity"
    uses_advantages = False

    def value(self, s, logp, advantages, t):
        return logp


GATES: dict[str, type[Gate]] = {
    gate.name: gate
    for gate in (
        PpoClip, LogBand, Cispo, Sapo, Reinforce, Quadratic, Topr, Vespo, DppoTv, DppoKl, KlK1, KlK2, KlK3,
        KlK1Unbiased, KlK3Unbiased, Identity,
    )
}  # fmt: skip


def map_params(gate: Gate, change) -> Gate:
    """The same gate with `change(name, tensor)` applied to each of its tensor parameters."""
    values = {name: getattr(gate, name) for name in gate.names}
    if not any(isinstance(value, Tensor) for value in values.values()):
        return gate
    return type(gate)(**{name: change(name, v) if isinstance(v, Tensor) else v for name, v in values.items()})


def check_params(gate: Gate) -> None:
    """Numbers must be numbers, and no parameter may expect a gradient."""
    for name in gate.names:
        value = getattr(gate, name)
        if isinstance(value, Tensor) and value.requires_grad:
            raise wrong(name, "a tensor that requires grad", "a constant; bounds carry no gradient, detach it")
        if isinstance(value, float) and value != value:
            raise wrong(name, "nan", "a number or a tensor with one value per token")
