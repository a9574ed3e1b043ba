"""Mistakes of the gate: where and for whom it clips."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....objectives.gates.base import INF, Bounds, Gate, clamp, product
from ....objectives.gates.bounded import LogBand, PpoClip, Ratio
from ....objectives.gates.weighted import Cispo
from ....objectives.policy import objective
from ..around import Around
from ..computation import Change, Computation
from .base import Mistake, Question, flat_gate, with_gate

EXCHANGED = (("eps_low", "eps_high"), ("span_eps_low", "span_eps_high"))


def of(*gates: type[Gate]) -> Question:
    return lambda computation: type(computation.row.gate) in gates


class Swapped(Around):
    """What is done for A > 0 is done for A < 0: of PPO the minimum of the losses in place of the maximum."""

    name = "swapped"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return -self.inner.value(s, x, logp, -advantages, t)

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        return self.inner.clipped(s, x, logp, -advantages, t)


class Negated(Around):
    name = "negated"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return -self.inner.value(s, x, logp, advantages, t)


class BothSides(Around):
    """-A clip(r), whatever the sign of A."""

    name = "both_sides"

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        gate = self.inner
        if isinstance(gate, LogBand):
            width = t**gate.power
            return product(-advantages, clamp(s, -gate.eps_low * width, gate.eps_high * width).exp())
        assert isinstance(gate, PpoClip)
        return product(-advantages, clamp(s.exp(), 1 - gate.eps_low, 1 + gate.eps_high))


class NotDetached(Around):
    """The weight of CISPO with its gradient."""

    name = "not_detached"

    def __init__(self, inner: Gate):
        super().__init__(inner)
        vars(self)["slopes"] = ("s", "logp")

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return product(-advantages, clamp(s.exp(), *self.inner.params()) * logp)


def around(kind: type[Around]) -> Change:
    return with_gate(lambda computation: kind(flat_gate(computation)))


def changing(**parameters: Any) -> Change:
    return lambda computation: replace(computation, row=objective(computation.row, **parameters))


def in_ratio_space(exponential: bool) -> Change:
    """The band around 1: 1 +- eps u, its upper end for A < 0 as well, or e^(eps_dual u)."""

    def make(computation: Computation) -> Gate:
        gate, t = computation.row.gate, computation.positions().clamp(min=1)
        assert isinstance(gate, LogBand)
        width = t.view(computation.layout.shape) ** gate.power
        dual = (gate.eps_dual * width).exp() if exponential else 1 + gate.eps_dual * width
        return PpoClip(gate.eps_low * width, gate.eps_high * width, dual)

    return with_gate(make)


def in_log_space(computation: Computation) -> Gate:
    gate = computation.row.gate
    assert isinstance(gate, PpoClip)
    dual = torch.as_tensor(gate.dual, dtype=torch.float64).log()
    return LogBand(gate.eps_low, gate.eps_high, dual if isinstance(gate.dual, Tensor) else dual.item(), power=0.0)


def exchange(computation: Computation) -> Computation:
    gate = computation.row.gate
    pairs = [(one, getattr(gate, other)) for a, b in EXCHANGED if a in gate.names for one, other in ((a, b), (b, a))]
    return replace(computation, row=objective(computation.row, **dict(pairs)))


def has_bounds(computation: Computation) -> bool:
    return all(getattr(computation.row.gate, name, None) is not None for name in EXCHANGED[0])


def is_finite(parameter: str, wanted: bool) -> Question:
    def applies(computation: Computation) -> bool:
        value = getattr(computation.row.gate, parameter, None)
        return value is not None and (isinstance(value, Tensor) or value != INF) == wanted

    return applies


def clips() -> Iterator[Mistake]:
    clip, log_space = "clip in ratio instead of log space", "clip in log instead of ratio space"
    yield Mistake(clip, "1 - eps u to 1 + eps u", in_ratio_space(False), of(LogBand))
    yield Mistake(clip, "1 - eps u to 1 + eps u, the dual clip e^(eps_dual u)", in_ratio_space(True), of(LogBand))
    yield Mistake(log_space, "-eps_low to eps_high", with_gate(in_log_space), of(PpoClip))
    yield Mistake("width of the clip without the position", "", changing(power=0.0), of(LogBand))
    how = "the minimum of the losses, or what is for A > 0 for A < 0"
    yield Mistake("sign subsets swapped", how, around(Swapped), lambda c: c.row.gate.uses_advantages)
    yield Mistake("bounds exchanged", "eps_low is above, eps_high below", exchange, has_bounds)
    yield Mistake("clipped on both sides", "-A clip(r) for either sign of A", around(BothSides), of(PpoClip, LogBand))
    yield Mistake("not clipped", "", with_gate(lambda _: Ratio()), of(PpoClip, LogBand))
    for parameter in ("dual", "eps_dual"):
        off = changing(**{parameter: INF})
        yield Mistake("no dual clip", "", off, is_finite(parameter, True))
    yield Mistake("a dual clip", "at 3, verl's default", changing(dual=3.0), is_finite("dual", False))
    yield Mistake("weight not detached", "", around(NotDetached), of(Cispo))
    yield Mistake("sign of the loss", "", around(Negated))
