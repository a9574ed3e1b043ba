"""Gates whose bounds or advantages come from entropies, and those that mix two ratios (see base.py)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import INF, Bound, Bounds, Gate, as_tensor_like, clamp, parametrised, surrogate


@parametrised
class DhpoGate(Gate):
    """Base of DHPO: the token's ratio r = e^x and the span's q = e^s, each in a trust region of its own, mixed with
    weight w = mix on the token.

    Fixed by the source: clipping before mixing, constant w, q the length-normalised ratio of the sequence. Our reading:
    joint minimum (dhpo) or one minimum per branch (dhpo_branch), the bounds, and which branch a high entropy favours:
    mix is 1/2 ("averaged") or tokenrl.entropy_mix(entropy), high entropy -> token ("entropy-guided").

    Source: arXiv 2601.05607 (notes, our reading).
    """

    mix: Bound = 0.5
    eps_low: Bound = 0.2
    eps_high: Bound = 0.28
    span_eps_low: Bound = 3e-4
    span_eps_high: Bound = 4e-4


@parametrised
class Dhpo(DhpoGate):
    """l = max(-A m, -A c), m = w r + (1 - w) q, c = w clip(r) + (1 - w) clip(q). See DhpoGate."""

    name = "dhpo"

    def _mixed(self, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        own, span = x.exp(), s.exp()
        kept = clamp(own, 1 - self.eps_low, 1 + self.eps_high)
        span_kept = clamp(span, 1 - self.span_eps_low, 1 + self.span_eps_high)
        return self.mix * own + (1 - self.mix) * span, self.mix * kept + (1 - self.mix) * span_kept

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        mixed, kept = self._mixed(s, x)
        # No torch.maximum: where both are equal nothing is clipped, and the slope is that of the unclipped mixture.
        bound = torch.where(advantages < 0, mixed < kept, mixed > kept)
        return -advantages * torch.where(bound, kept, mixed)

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        mixed, kept = self._mixed(s, x)
        low, high = (advantages < 0) & (mixed < kept), (advantages > 0) & (mixed > kept)
        return low, high, torch.zeros_like(low)


@parametrised
class DhpoBranch(DhpoGate):
    """l = w max(-A r, -A clip(r)) + (1 - w) max(-A q, -A clip(q)). See DhpoGate. clip_low, clip_high: either branch."""

    name = "dhpo_branch"

    def _branches(self, s: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Bound, Bound]]:
        """(ratio, its bounds) of the token and of the span."""
        yield x.exp(), 1 - self.eps_low, 1 + self.eps_high
        yield s.exp(), 1 - self.span_eps_low, 1 + self.span_eps_high

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        own, span = (surrogate(r, clamp(r, low, high), INF, advantages) for r, low, high in self._branches(s, x))
        return self.mix * own + (1 - self.mix) * span

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        low, high = (torch.zeros_like(s, dtype=torch.bool) for _ in range(2))
        for ratio, least, most in self._branches(s, x):
            low, high = low | (ratio < least), high | (ratio > most)
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
        inside = (ratio.detach() > 1 - eps_low / 2) & (ratio.detach() < 1 + eps_high / 2)
        advantages = torch.where(inside == (score > 0), advantages, advantages * (1 + self.beta * score))
        return ratio, 1 - eps_low, 1 + eps_high, advantages

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        ratio, low, high, advantages = self._adapted(s, advantages)
        return surrogate(ratio, clamp(ratio, low, high), self.dual, advantages)

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        ratio, low, high, advantages = self._adapted(s, advantages)
        negative = advantages < 0
        return negative & (ratio < low), (advantages > 0) & (ratio > high), negative & (ratio > self.dual)
