"""Forms that weigh the tokens by what all log-probs say, without gradient (see base.py): CPPO, FIPO, clip_cov,
kl_cov."""

import torch
from torch import Tensor

from ...batch.checks import check_name
from ...batch.layout import Layout
from ...batch.valid_tokens import HOLES
from ..gates.base import INF, parametrised, product
from ..gates.kl import KlAbs
from .base import Form, FormInputs


@parametrised
class PrefixBudget(Form):
    """Tokens that leave the old policy's region are dropped once their prefix has spent its budget.

        w_t = 1 - (1 - w_min) (t - 1) / (n - 1), Z_t = w_t D_t, S and W their sums over the tokens before t
        kept: A (r - 1) <= 0 or Z_t <= min(delta, delta + b W - S)
        b = the quantile of D over the span, clipped to [delta_b, 2 delta_b]; quantile None: delta_b itself

    D: divergence, one value per token (tokenrl.topk_divergence), or None: |p - mu|, mu the old policy's. The sums count
    dropped tokens too. clip_low: dropped with A < 0, clip_high: A > 0.

    Source: CPPO, arXiv 2606.10968 (paper); UniRL (trainers).
    """

    delta: float = 0.15
    delta_b: float = 0.02
    w_min: float = 0.8
    quantile: float | None = 0.9
    divergence: Tensor | None = None

    @torch.no_grad()
    def dropped(self, tokens: FormInputs) -> Tensor:
        divergence = self.divergence
        if divergence is None:
            divergence = (tokens.logp.exp() - (tokens.logp - tokens.x).exp()).abs()
        divergence = torch.where(tokens.valid, divergence, 0)
        n = tokens.lengths()
        w = torch.where(tokens.valid, 1 - (1 - self.w_min) * (tokens.positions() - 1) / (n - 1).clamp(min=1), 0)
        spent = w * divergence
        before = {name: tokens.statistic_of(x, "prefix_sum") - x for name, x in (("spent", spent), ("w", w))}
        budget = torch.full_like(w, self.delta_b)
        if self.quantile is not None:
            budget = _quantile(divergence, tokens, self.quantile).clamp(self.delta_b, 2 * self.delta_b)
        allowed = (self.delta + budget * before["w"] - before["spent"]).clamp(max=self.delta)
        return tokens.valid & (tokens.advantages * tokens.x.expm1() > 0) & (spent > allowed)

    def evaluate(self, tokens: FormInputs) -> tuple[Tensor, Tensor]:
        dropped = self.dropped(tokens)
        loss, raw = tokens.run(factor=(~dropped).to(tokens.logp.dtype))
        positive = tokens.advantages > 0
        return loss, tokens.counted(raw, dropped & ~positive, dropped & positive)


def _quantile(x: Tensor, tokens: FormInputs, q: float) -> Tensor:
    """[N]: the quantile of x over the valid tokens of each token's span, interpolated linearly."""
    span = tokens.span()
    order = torch.where(tokens.valid, x, INF).argsort(stable=True)
    order = order[span[order].argsort(stable=True)]
    starts = torch.searchsorted(span, span)  # spans are runs of tokens
    rank = q * (tokens.lengths() - 1).to(torch.float64)
    low = rank.floor()
    below, above = (torch.where(tokens.valid, x, 0)[order[starts + at.long()]] for at in (low, rank.ceil()))
    return below + (rank - low).to(x.dtype) * (above - below)


@parametrised
class FutureKl(Form):
    """PPO's loss times a constant f_t = clip(exp F_t, low, high), F_t = sum_{k >= t} gamma^(k - t) x_k up to the end of
    the sequence, gamma = 2^(-1 / half_life).

    holes: what a masked cell is to the distance k - t: "skip" nothing (our reading), "count" a step, as in ms-swift.
    Terms with r > ceiling add 0; where A < 0 and r > safety, f is clipped to [0.8, 1]. The paper's range is [1, 1.2],
    ms-swift's other [0.8, 1.2].

    Source: FIPO, arXiv 2603.19835, ms-swift (trainers).
    """

    half_life: float = 32.0
    low: float = 1.0
    high: float = 1.2
    ceiling: float = INF
    safety: float = 4.0
    holes: str = "skip"

    def __post_init__(self) -> None:
        check_name("holes", self.holes, HOLES)

    @torch.no_grad()
    def factor(self, tokens: FormInputs) -> Tensor:
        ratio, gamma = tokens.x.exp(), 2 ** (-1 / self.half_life)
        terms = torch.where(ratio > self.ceiling, 0, tokens.x)
        steps = tokens.valid if self.holes == "skip" else torch.ones_like(tokens.valid)
        future = _suffix_sums(terms, torch.where(steps, terms.new_tensor(gamma), 1), tokens.layout)
        factor = future.exp().clamp(self.low, self.high)
        risky = (tokens.advantages < 0) & (ratio > self.safety)
        return torch.where(risky, factor.clamp(0.8, 1.0), factor)

    def evaluate(self, tokens: FormInputs) -> tuple[Tensor, Tensor]:
        return tokens.run(factor=self.factor(tokens))


def _suffix_sums(x: Tensor, entry: Tensor, layout: Layout) -> Tensor:
    """y_t = x_t + entry_{t+1} y_{t+1} inside each sequence, in log2 steps, on all cells: their number is known to a
    trace, unlike that of the valid tokens."""
    first = torch.zeros(x.numel() + 1, dtype=torch.bool, device=x.device).index_fill(0, layout.cu_seqlens, True)
    x, factor = torch.cat([x, x.new_zeros(1)]), torch.where(first, 0, torch.cat([entry, entry.new_zeros(1)]))
    factor = torch.cat([factor[1:], factor.new_zeros(1)])
    distance = 1
    while distance < (layout.width or x.numel()):
        nothing = x.new_zeros(min(distance, x.numel()))
        x = x + product(factor, torch.cat([x[distance:], nothing]))
        factor = factor * torch.cat([factor[distance:], nothing])
        distance *= 2
    return x[:-1]


@parametrised
class _Covariance(Form):
    """Base: (A - mean A)(logp - mean logp) per token, means over the valid tokens of the call, or those given, of a
    global batch. fraction: of the valid tokens of the call, one at least."""

    fraction: float = 2e-4
    mean_advantages: float | None = None
    mean_logp: float | None = None

    def covariance(self, tokens: FormInputs) -> Tensor:
        logp, valid = torch.where(tokens.valid, tokens.logp.detach(), 0), tokens.valid
        n = valid.sum().clamp(min=1)
        mean_a = tokens.advantages.sum() / n if self.mean_advantages is None else self.mean_advantages
        mean_logp = logp.sum() / n if self.mean_logp is None else self.mean_logp
        return (tokens.advantages - mean_a) * (logp - mean_logp)

    def budget(self, tokens: FormInputs) -> int:
        """How many tokens are selected; it is a number, so this waits for the device."""
        return max(int(self.fraction * int(tokens.valid.sum())), 1)


@parametrised
class ClipCov(_Covariance):
    """PPO without a random fraction of the tokens whose covariance lies in (low, high) and that PPO does not clip.

    rate: the share of those within that is dropped, in place of fraction, so that the parts of a batch drop together as
    many as the whole would: min(max(fraction N, 1) / M, 1), N its valid tokens and M those within; each token by a draw
    of its own. The choice is torch's generator's: seed it there. clip_low counts PPO's and the dropped tokens of A < 0,
    clip_high those of A > 0.

    Source: clip_cov, arXiv 2505.22617, verl (trainers).
    """

    low: float = 1.0
    high: float = 5.0
    rate: float | None = None

    def candidates(self, tokens: FormInputs) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens of which some are dropped, PPO's clip from below, from above)."""
        below, above, _ = tokens.gate.clipped(tokens.x, tokens.x, tokens.logp, tokens.advantages, tokens.positions())
        below, above = below & tokens.valid, above & tokens.valid
        covariance = self.covariance(tokens)
        inside = (covariance > self.low) & (covariance < self.high) & tokens.valid & ~below & ~above
        return inside, below, above

    @torch.no_grad()
    def dropped(self, tokens: FormInputs) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens that are dropped, PPO's clip from below, from above)."""
        inside, below, above = self.candidates(tokens)
        if self.rate is not None:
            return inside & (torch.rand(inside.shape, device=inside.device) < self.rate), below, above
        candidates = inside.nonzero()[:, 0]
        chosen = candidates[torch.randperm(candidates.numel(), device=candidates.device)[: self.budget(tokens)]]
        return torch.zeros_like(inside).index_fill(0, chosen, True), below, above

    def evaluate(self, tokens: FormInputs) -> tuple[Tensor, Tensor]:
        dropped, below, above = self.dropped(tokens)
        loss, raw = tokens.run(factor=(~dropped).to(tokens.logp.dtype))
        negative = tokens.advantages < 0
        return loss, tokens.counted(raw, below | (dropped & negative), above | (dropped & ~negative))


@parametrised
class KlCov(_Covariance):
    """-A r without a clip, and coef |x| on the fraction of the tokens with the highest covariance, at least one.

    coef is 1 in the paper's recipe, 0.1 in verl's configuration. threshold: the least covariance that is selected, in
    place of fraction: that of the whole of a batch in parts.

    Source: kl_cov, arXiv 2505.22617, verl (trainers).
    """

    coef: float = 1.0
    threshold: float | None = None

    @torch.no_grad()
    def selected(self, tokens: FormInputs) -> Tensor:
        covariance = torch.where(tokens.valid, self.covariance(tokens), -INF)
        if self.threshold is not None:
            return tokens.valid & (covariance >= self.threshold)
        top = covariance.argsort(descending=True, stable=True)[: self.budget(tokens)]
        return torch.zeros_like(tokens.valid).index_fill(0, top, True) & tokens.valid

    def evaluate(self, tokens: FormInputs) -> tuple[Tensor, Tensor]:
        loss, raw = tokens.run()
        if self.coef == 0:  # which hides even an infinite penalty
            return loss, raw
        penalty, _ = tokens.run(factor=self.selected(tokens).to(tokens.logp.dtype), gate=KlAbs())
        return loss + self.coef * penalty, raw
