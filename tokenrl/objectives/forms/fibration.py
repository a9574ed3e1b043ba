"""Forms of fibration policy optimization, which replace the log ratio (see base.py)."""

import torch
from torch import Tensor

from ...errors import wrong
from ..gates.base import parametrised
from .base import Form, FormInputs


def _gated(x: Tensor, bound: float, n: Tensor) -> Tensor:
    """FiberPO's gate for an aggregate x: x up to the bound on either side, back to 0 with slope -n, then 0."""
    size = x.abs()
    rolled = x.sign() * ((n + 1) * bound - n * size)
    return torch.where(size <= bound, x, torch.where(size < (1 + 1 / n) * bound, rolled, 0))


@parametrised
class FiberPo(Form):
    """log G_t = g(S+, c_pos) - g(S-, c_neg) + clip(num_t) - clip(den_t), loss -A G; clip to [-eps, eps].

        S+ = mean of max(x, 0), S- = mean of max(-x, 0) over the span's n tokens; sign l_t = + where x_t >= 0, else -
        num_t = x_t - l_t S^(l_t), den_t = -l_t S^(-l_t)
        g(S, C) = S for |S| <= C, sign(S) ((n + 1) C - n |S|) for C < |S| < (1 + 1 / n) C, 0 beyond

    Everything is differentiated, the aggregates S too, at the bounds as inside them. Where nothing is gated or clipped
    G = r. c_pos, c_neg and eps are the paper's illustration (fig. 4). clip_low, clip_high count the tokens whose num is
    clipped.

    Source: FiberPO, arXiv 2603.08239; JoyAI-LLM Flash, arXiv 2604.03044 sec. 3.3.1 (paper, verified).
    """

    replaces_ratio = True
    c_pos: float = 0.12
    c_neg: float = 0.05
    eps: float = 0.04

    def _base(self, tokens: FormInputs, aggregate: Tensor, bound: float) -> Tensor:
        """The gated part of one sign; aggregate: of each token's span."""
        return _gated(aggregate, bound, tokens.lengths())

    def evaluate(self, tokens: FormInputs) -> tuple[Tensor, Tensor]:
        x = tokens.x
        upwards = x >= 0
        above = tokens.statistic_of(torch.where(upwards & tokens.valid, x, 0), "span_mean")
        below = tokens.statistic_of(torch.where(upwards, 0, -x), "span_mean")
        base = self._base(tokens, above, self.c_pos) - self._base(tokens, below, self.c_neg)
        num = x - torch.where(upwards, above, -below)
        den = torch.where(upwards, -below, above)
        fibre = num.clamp(-self.eps, self.eps) - den.clamp(-self.eps, self.eps)
        loss, raw = tokens.run(log_ratio=torch.where(tokens.valid, base + fibre, 0))
        return loss, tokens.counted(raw, num < -self.eps, num > self.eps)


@parametrised
class FiberPoDomain(FiberPo):
    """FiberPO with the gates of three nested means in place of g(S, C), for each sign with its own C:

        g(S_D, C) of n_D tokens + g(S_G - S_D, C) of n_G + g(S - S_G, C) of n

    S_G is the mean of S over the spans of the group (group_ids), S_D over those of the domain, n_G and n_D their
    tokens. domain: a number for each token, the same for all of a group; None: the batch is one domain. Groups and
    domains must be whole in a call.

    Source: FiberPO-Domain, arXiv 2603.08239, definition 6.4 (paper).
    """

    domain: Tensor | None = None

    def _base(self, tokens: FormInputs, aggregate: Tensor, bound: float) -> Tensor:
        n, layout = tokens.lengths(), tokens.layout
        if tokens.group_ids is None:
            raise wrong(
                "group_ids", None, f"one integer per sequence, [{layout.num_sequences}]; FiberPO-Domain's groups"
            )
        group = _numbered(layout.spread(layout.flat_sequences("group_ids", tokens.group_ids, torch.int64)))
        domain = (
            torch.zeros_like(group) if self.domain is None else _numbered(torch.where(tokens.valid, self.domain, 0))
        )
        share = tokens.valid / n  # a span counts once
        means, sizes = [], []
        for index in (domain, group):
            totals = [_total(index, y) for y in (share * aggregate, share, tokens.valid.to(n.dtype))]
            means.append(totals[0] / totals[1].clamp(min=1))
            sizes.append(totals[2].clamp(min=1))
        parts = ((means[0], sizes[0]), (means[1] - means[0], sizes[1]), (aggregate - means[1], n))
        return torch.stack([_gated(x, bound, size) for x, size in parts]).sum(0)


def _numbered(ids: Tensor) -> Tensor:
    """int64 [N], below N: equal where the ids are."""
    return torch.searchsorted(ids.sort().values, ids)


def _total(index: Tensor, x: Tensor) -> Tensor:
    """[N]: the sum of x over the tokens of the same number."""
    return torch.zeros_like(x).index_add(0, index, x)[index]


@parametrised
class ApcObj(Form):
    """l = -A (1 + clip(r - 1, B)), clip to [-max(B, 0), max(B, 0)], B_t = T_s delta - sum of |r - 1| over the other
    samples of the state s of t.

    state: a number for each token, equal where tokens were sampled from one state (one prefix), T_s of them; None: no
    two were, and B is delta. Everything is differentiated, B too, which is our reading, as delta is: c_pos + c_neg of
    fiberpo. clip_low, clip_high count the tokens that are clipped.

    Source: APC-Obj, arXiv 2603.08239 eq. 3 (paper, our reading).
    """

    replaces_ratio = True
    delta: float = 0.17
    state: Tensor | None = None

    def evaluate(self, tokens: FormInputs) -> tuple[Tensor, Tensor]:
        change = torch.where(tokens.valid, tokens.x.expm1(), 0)
        budget = torch.full_like(change, self.delta)
        if self.state is not None:
            index = _numbered(torch.where(tokens.valid, self.state, 0))
            samples, spent = (_total(index, y) for y in (tokens.valid.to(change.dtype), change.abs()))
            budget = samples * self.delta - (spent - change.abs())
        budget = budget.clamp(min=0)
        low, high = change < -budget, change > budget
        kept = torch.where(low, -budget, torch.where(high, budget, change))
        loss, raw = tokens.run(log_ratio=kept.log1p())
        return loss, tokens.counted(raw, low, high)
