"""Estimators of KL(pi || ref) as gates (see base.py)."""

import torch
from torch import Tensor

from ..excess import excess
from .base import INF, Bound, Gate, parametrised, straight_through


@parametrised
class KlGate(Gate):
    """Base of the estimators of KL(pi || ref): the statistic is logp - ref_logp, so `old_logp` is the reference's."""

    uses_advantages = False


def estimates(gate: Gate, logp: Tensor, ref_logp: Tensor, mask: Tensor, clamp: float, cap: float) -> Tensor:
    """The estimate of each token, zero in masked cells."""
    s = torch.where(mask, logp - ref_logp, 0).clamp(-clamp, min(clamp, cap))
    return gate.value(s, s, s, s, s)


@parametrised
class KlK1(KlGate):
    """l = s. Schulman's k1: right value; as a loss its expected gradient is zero."""

    name = "kl_k1"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return s


@parametrised
class KlAbs(KlGate):
    """l = |s| (verl "abs"). As a loss its gradient is a sign, 0 at s = 0."""

    name = "kl_abs"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return s.abs()


@parametrised
class KlK2(KlGate):
    """l = s^2 / 2. Schulman's k2: on-policy its gradient is that of the reverse KL."""

    name = "kl_k2"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return s * s / 2


def _k3(s: Tensor, ceiling: Bound) -> Tensor:
    """min(e^-s + s - 1, ceiling), without a gradient above even where it is infinite."""
    above = excess(-s) > ceiling
    return torch.where(above, ceiling, excess(torch.where(above, 0, -s)))


@parametrised
class KlK3(KlGate):
    """l = min(e^-s + s - 1, ceiling). Schulman's k3, non-negative; verl clamps it at ceiling = 10 (zero gradient
    above), TRL does not."""

    name = "kl_k3"
    ceiling: Bound = INF

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return _k3(s, self.ceiling)


@parametrised
class KlK1Unbiased(KlGate):
    """Value of k1, gradient of k2 (verl "k1+")."""

    name = "kl_k1_unbiased"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return straight_through(s, s * s / 2)


@parametrised
class KlAbsUnbiased(KlGate):
    """Value |s|, gradient of k2 (verl "abs+")."""

    name = "kl_abs_unbiased"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return straight_through(s.abs(), s * s / 2)


@parametrised
class KlK3Unbiased(KlGate):
    """Value of k3, gradient of k2 (verl "k3+"). With token_weight = r it is the importance-corrected k3 (DeepSeek-V3.2,
    TRL use_bias_correction_kl): value r k3, gradient r s."""

    name = "kl_k3_unbiased"
    ceiling: Bound = INF

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return straight_through(_k3(s, self.ceiling), s * s / 2)
