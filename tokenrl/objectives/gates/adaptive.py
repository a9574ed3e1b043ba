"""Gates whose bounds or advantages come from entropies, and those that mix two ratios (see base.py)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import (
    DUAL,
    INF,
    SHARE,
    WIDTH,
    Bound,
    Bounds,
    Gate,
    as_tensor_like,
    clamp,
    parametrised,
    product,
    surrogate,
    used,
)


@parametrised
class DhpoGate(Gate):
    """Base of DHPO: the token's ratio r = e^x and the span's q = e^s, each in a trust region of its own, mixed with
    weight w = mix on the token.

    Fixed by the source: clipping before mixing, constant w, q the length-normalised ratio of the sequence. Our reading:
    joint minimum (dhpo) or one minimum per branch (dhpo_branch), the bounds, and which branch a high entropy favours:
    mix is 1/2 ("averaged") or tokenrl.entropy_mix(entropy), high entropy -> token ("entropy-guided").

    Source: arXiv 2601.05607 (notes, our reading).
    """

    ranges = dict.fromkeys(("eps_low", "eps_high", "span_eps_low", "span_eps_high"), WIDTH) | {"mix": SHARE}
    mix: Bound = 0.5
    eps_low: Bound = 0.2
    eps_high: Bound = 0.28
    span_eps_low: Bound = 3e-4
    span_eps_high: Bound = 4e-4


def _clipped_ratio(s: Tensor, low: Bound, high: Bound) -> Tensor:
    """clip(e^s, low, high), without a gradient outside even of infinity."""
    ratio = s.exp()
    outside = (ratio < low) | (ratio > high)
    return torch.where(outside, clamp(ratio.detach(), low, high), torch.where(outside, 0, s).exp())


@parametrised
class Dhpo(DhpoGate):
    """l = max(-A m, -A c), m = w r + (1 - w) q, c = w clip(r) + (1 - w) clip(q). See DhpoGate."""

    name = "dhpo"

    def _mixed(self, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        own = _clipped_ratio(x, 1 - self.eps_low, 1 + self.eps_high)
        span = _clipped_ratio(s, 1 - self.span_eps_low, 1 + self.span_eps_high)
        rest = 1 - self.mix
        mixed = self.mix * used(self.mix, x).exp() + rest * used(rest, s).exp()
        return mixed, self.mix * own + rest * span

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        mixed, kept = self._mixed(s.detach(), x.detach())
        # No torch.maximum: where both are equal nothing is clipped, and the slope is that of the unclipped mixture.
        bound = torch.where(advantages < 0, mixed < kept, mixed > kept)
        mixed, _ = self._mixed(*(torch.where(bound, 0, y) for y in (s, x)))
        _, kept = self._mixed(*(torch.where(bound, y, 0) for y in (s, x)))
        return product(-advantages, torch.where(bound, kept, mixed))

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        mixed, kept = self._mixed(s, x)
        low, high = (advantages < 0) & (mixed < kept), (advantages > 0) & (mixed > kept)
        return low, high, torch.zeros_like(low)


@parametrised
class DhpoBranch(DhpoGate):
    """l = w max(-A r, -A clip(r)) + (1 - w) max(-A q, -A clip(q)). See DhpoGate. clip_low, clip_high: either branch."""

    name = "dhpo_branch"

    def _branches(self, s: Tensor, x: Tensor) -> Iterator[tuple[Bound, Tensor, Bound, Bound]]:
        """(weight, log ratio, the ratio's bounds) of the token and of the span."""
        yield self.mix, x, 1 - self.eps_low, 1 + self.eps_high
        yield 1 - self.mix, s, 1 - self.span_eps_low, 1 + self.span_eps_high

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        own, span = (w * surrogate(used(w, y), low, high, INF, advantages) for w, y, low, high in self._branches(s, x))
        return own + span

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        low, high = (torch.zeros_like(s, dtype=torch.bool) for _ in range(2))
        for _, y, least, most in self._branches(s, x):
            low, high = low | (y.exp() < least), high | (y.exp() > most)
        return (advantages < 0) & low, (advantages > 0) & high, torch.zeros_like(low)


@parametrised
class Hapo(Gate):
    """PPO's clip whose bounds and advantages follow the token's entropy score h in [-1, 1] (tokenrl.bounds.hapo_score).

        h <= 0: eps_low' = eps_low (1 - alpha h);   h > 0: eps_high' = eps_high (1 + alpha h)
        A' = A (1 + beta h) where h > 0 and r lies outside (1 - eps_low' / 2, 1 + eps_high' / 2), or h <= 0 and inside
        l = max(-A' r, -A' clip(r, 1 - eps_low', 1 + eps_high')), A' < 0: at most -A' dual

    h, the bounds and A' are constants. score: h per token; 0 is PPO.

    Source: HAPO, arXiv 2509.16591 (authors' code).
    """

    name = "hapo"
    ranges = {"eps_low": WIDTH, "eps_high": WIDTH, "dual": DUAL}
    eps_low: Bound = 0.2
    eps_high: Bound = 0.2
    dual: Bound = 10.0
    score: Bound = 0.0
    alpha: Bound = 1.0
    beta: Bound = 1.0

    def _adapted(self, s: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ratio, its bounds, A')."""
        ratio, score = s.exp(), as_tensor_like(self.score, s)
        wider = 1 + self.alpha * score.abs()
        eps_low = self.eps_low * torch.where(score > 0, 1, wider)
        eps_high = self.eps_high * torch.where(score > 0, wider, 1)
        inside = (ratio > 1 - eps_low / 2) & (ratio < 1 + eps_high / 2)
        advantages = torch.where(inside == (score > 0), advantages, advantages * (1 + self.beta * score))
        return ratio, 1 - eps_low, 1 + eps_high, advantages

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        _, low, high, advantages = self._adapted(s.detach(), advantages)
        return surrogate(s, low, high, self.dual, advantages)

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        ratio, low, high, advantages = self._adapted(s, advantages)
        negative = advantages < 0
        return negative & (ratio < low), (advantages > 0) & (ratio > high), negative & (ratio > self.dual)
