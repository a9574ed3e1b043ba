"""Gates around other gates: one that keeps what it sees, the base of those that change something."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...objectives.gates.base import Bounds, Gate, map_params

REACH = 10.0  # of log ratios, in which clip edges are looked for
INHERITED = ("uses_advantages", "vanishes", "slopes", "reads_rollout")


class Around(Gate):
    """Base: what it does not change is as the inner gate's, whose tensors are flat. It runs on the reference alone."""

    name = "around"

    def __init__(self, inner: Gate):
        vars(self).update({name: getattr(inner, name) for name in INHERITED}, inner=inner)

    inner: Gate

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        return self.inner.value(s, x, logp, advantages, t)

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        return self.inner.clipped(s, x, logp, advantages, t)

    def weighed(self, weights: Callable[[], Tensor]) -> Gate:
        other = copy.copy(self)
        vars(other)["inner"] = self.inner.weighed(weights)
        return other


@dataclass(frozen=True)
class Seen:
    """What a gate saw of the tokens, flat [N]: the statistic, the own log ratio, log-prob, advantage and position."""

    gate: Gate
    s: Tensor
    x: Tensor
    logp: Tensor
    advantages: Tensor
    t: Tensor

    def clipped(self, shift: Tensor | float = 0.0) -> Tensor:
        """bool [3, N]: which bound is active, were log-probs shifted."""
        found = self.gate.clipped(self.s + shift, self.x + shift, self.logp + shift, self.advantages, self.t)
        return torch.stack([bound.expand_as(self.s) for bound in found])

    def bounds(self, token: int, shifts: Tensor) -> Tensor:
        """bool [3, shifts]: which bound would be active on a token, were its log-prob shifted by each of them."""
        logp = self.logp[token].expand_as(shifts)
        t, a = (y[token].expand_as(shifts) for y in (self.t, self.advantages))
        gate = map_params(self.gate, lambda name, bound: bound[token])
        found = gate.clipped(self.s[token] + shifts, self.x[token] + shifts, logp + shifts, a, t)
        return torch.stack([bound.expand_as(shifts) for bound in found])

    def distance(self, token: int) -> float | None:
        """By how much the log ratio of a token must rise, or below 0 fall, to reach the nearest clip edge; None: there
        is none within +-REACH."""
        steps = torch.logspace(-9, 0, 400, dtype=torch.float64) * REACH
        found = [edge for sign in (1.0, -1.0) if (edge := self._first_edge(token, sign * steps)) is not None]
        return min(found, key=abs, default=None)

    def _first_edge(self, token: int, shifts: Tensor) -> float | None:
        here = self.bounds(token, shifts.new_zeros(1))
        changed = (self.bounds(token, shifts) != here).any(0).nonzero()
        if not changed.numel():
            return None
        last = int(changed[0])
        low, high = (shifts[last - 1].item() if last else 0.0), shifts[last].item()
        for _ in range(60):
            middle = (low + high) / 2
            same = torch.equal(self.bounds(token, shifts.new_tensor([middle])), here)
            low, high = (middle, high) if same else (low, middle)
        return high


class Watched(Around):
    """Keeps what it sees, and its values, in whose graph the loss is."""

    name = "watched"

    def __init__(self, inner: Gate):
        super().__init__(inner)
        self.values: list[Tensor] = []
        self.seen: list[Seen] = []

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        value = self.inner.value(s, x, logp, advantages, t)
        if value.requires_grad:
            self.values.append(value)
        return value

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        self.seen.append(Seen(self.inner, s, x, logp, advantages, t))
        return self.inner.clipped(s, x, logp, advantages, t)
