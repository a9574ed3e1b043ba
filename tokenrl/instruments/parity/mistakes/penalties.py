"""Mistakes of the KL penalty and of the entropy bonus."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ....objectives.gates.base import Gate, clamp, product
from ....objectives.gates.bounded import PpoClip
from ....objectives.gates.kl import KlGate, estimates
from ....objectives.policy import Objective, kl_estimator
from ..around import Around
from ..computation import Change, Computation
from .base import Mistake, flat_gate

ESTIMATORS = ("kl_k1", "kl_k2", "kl_k3", "kl_abs")


def has_kl(computation: Computation) -> bool:
    return "ref_logp" in computation.batch.tensors and computation.batch.settings.get("kl_coef", 0.0) != 0


def kl_of(computation: Computation) -> Objective:
    return kl_estimator(computation.batch.settings.get("kl") or "kl_k3")


class WithKl(Around):
    """Base of gates that have the penalty inside: kl(logp) is the coefficient times the estimate."""

    def __init__(self, inner: Gate, computation: Computation):
        super().__init__(inner)
        layout, row = computation.layout, kl_of(computation)
        ref = layout.flat_tokens("ref_logp", computation.batch.tensors["ref_logp"])
        known = (row.gate, ref, layout.valid(), row.clamp, row.cap)
        vars(self).update(known=known, coefficient=computation.batch.settings["kl_coef"], vanishes=False)

    def kl(self, logp: Tensor) -> Tensor:
        gate, *rest = vars(self)["known"]
        return vars(self)["coefficient"] * estimates(gate, logp, *rest)


class InAdvantage(WithKl):
    name = "kl_in_advantage"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return self.inner.value(s, x, logp, advantages - self.kl(logp), t)


class InReward(WithKl):
    name = "kl_in_reward"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return self.inner.value(s, x, logp, advantages - self.kl(logp.detach()), t)


class InMaximum(WithKl):
    """max(-A r + kl, -A clip(r))"""

    name = "kl_in_maximum"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        gate = self.inner
        assert isinstance(gate, PpoClip)
        kept = product(-advantages, clamp(s.exp(), 1 - gate.eps_low, 1 + gate.eps_high))
        return torch.maximum(product(-advantages, s.exp()) + self.kl(logp), kept)


class Reversed(KlGate):
    """The estimate with logp and ref_logp exchanged."""

    name = "kl_reversed"

    def __init__(self, inner: Gate):
        vars(self)["inner"] = inner

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return vars(self)["inner"].value(-s, -x, logp, advantages, t)


def inside(kind: type[WithKl]) -> Change:
    def change(computation: Computation) -> Computation:
        return computation.with_row(gate=kind(flat_gate(computation), computation)).set(kl_coef=0.0)

    return change


def reversed_kl(computation: Computation) -> Computation:
    row = kl_of(computation)
    return computation.set(kl=Objective("kl_reversed", "token", Reversed(row.gate), "token-mean", "", clamp=row.clamp))


def estimated_by(estimator: str, computation: Computation) -> Computation:
    return computation.set(kl=estimator)


def has_kl_and_old(computation: Computation) -> bool:
    return has_kl(computation) and "old_logp" in computation.batch.tensors


def against_old(computation: Computation) -> Computation:
    return computation.changed(ref_logp=computation.batch.tensors["old_logp"])


def has_entropy(computation: Computation) -> bool:
    return computation.batch.settings.get("entropy_coef", 0.0) != 0


def with_entropy(factor: float) -> Change:
    return lambda c: c.set(entropy_coef=factor * c.batch.settings["entropy_coef"])


def penalties() -> Iterator[Mistake]:
    def has_advantages(computation: Computation) -> bool:
        return has_kl(computation) and computation.row.gate.uses_advantages and computation.row.form is None

    name = "KL inside instead of outside the clip"
    yield Mistake(name, "taken off the advantage, with its gradient", inside(InAdvantage), has_advantages)
    yield Mistake(name, "taken off the advantage as a constant", inside(InReward), has_advantages)
    how = "max(-A r + kl, -A clip(r))"
    yield Mistake(name, how, inside(InMaximum), lambda c: has_kl(c) and type(c.row.gate) is PpoClip)
    yield Mistake("entropy bonus left out", "", with_entropy(0.0), has_entropy)
    yield Mistake("sign of the entropy bonus", "it is a penalty", with_entropy(-1.0), has_entropy)
    yield Mistake("KL left out", "", lambda c: c.set(kl_coef=0.0), has_kl)
    for estimator in ESTIMATORS:
        yield Mistake(f"KL by {estimator}", "", functools.partial(estimated_by, estimator), has_kl)
    yield Mistake("KL the wrong way round", "logp and ref_logp exchanged", reversed_kl, has_kl)
    yield Mistake("KL to the old policy", "in place of the reference", against_old, has_kl_and_old)
