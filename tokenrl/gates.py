"""THE definition of each gate: its parameters, its formula, its source, and its value in torch.

A gate turns the statistic `s` (a log ratio) of one token into that token's loss:

    value(s, logp, advantages, t) -> l        differentiable in s and logp
    clipped(s, advantages, t) -> low, high, dual      which bound is active (bool), for the metrics

t is the position: the 1-based count of valid tokens in the statistic's span. All arguments broadcast; parameters are
numbers or tensors with one value per token. Derivatives are autograd's here, hand-written in csrc/gates.h and
triton_kernels/gates.py. The kernels' own tensors never hold gradients for parameters.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .errors import unknown, wrong

Bound = float | Tensor
INF = float("inf")


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

    def clipped(self, s: Tensor, advantages: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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

    def clipped(self, s, advantages, t):
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

    def clipped(self, s, advantages, t):
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

    def clipped(self, s, advantages, t):
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
    gate.name: gate for gate in (PpoClip, LogBand, Cispo, Sapo, KlK1, KlK2, KlK3, KlK1Unbiased, KlK3Unbiased, Identity)
}


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
