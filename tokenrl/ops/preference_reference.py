"""The preference loss in differentiable torch: the authority that every kernel is tested against."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch.layout import Layout
from ..batch.pairs import sides_of
from ..batch.spans import spans_of
from ..objectives.links import OfLabels
from ..objectives.preference import Preference
from ..objectives.scores import Score
from .ranges import ranged

Number = float | Tensor


@dataclass(frozen=True)
class PreferenceInputs:
    """What a preference loss takes beside log-probs and divergences, checked. Of tokens: flat, [N].

    pairs: int64 [P, 2], of each the chosen and the rejected sequence; None: halves, or labelled sequences. Of these
    desirable: bool [S]; and base, 0-d fp64, what a score is compared with, None: their mean. pair_weight: fp64, one per
    loss. normalizer: None: the number of losses. nll_mask, nll_normalizer: None: the valid tokens of chosen sequences,
    and their number.
    """

    row: Preference
    layout: Layout
    ref_logp: Tensor | None
    token_weight: Tensor | None
    divergence_weight: Tensor | None
    pairs: Tensor | None
    desirable: Tensor | None
    base: Tensor | None
    pair_weight: Tensor | None
    normalizer: Number | None
    nll_mask: Tensor | None
    nll_normalizer: Number | None

    @property
    def sides(self) -> tuple[Tensor, Tensor] | None:
        """[P] each, the chosen and the rejected sequence of each pair; None of labelled sequences."""
        return None if self.desirable is not None else sides_of(self.pairs, self.layout)

    def nll_tokens(self) -> Tensor | None:
        """bool [N], of the nll term; None: there is none."""
        if self.row.nll == 0 or self.nll_mask is not None:
            return self.nll_mask
        chosen = self.desirable
        if (sides := self.sides) is not None:
            nobody = torch.zeros(self.layout.num_sequences, dtype=torch.bool, device=self.layout.cu_seqlens.device)
            chosen = nobody.index_fill(0, sides[0], True)
        assert chosen is not None
        return self.layout.valid() & self.layout.spread(chosen)


class Result(NamedTuple):
    """loss: 0-d. rewards: fp64 [3, M], of the chosen and of the rejected, and margins. accuracy: fp64, 0-d."""

    loss: Tensor
    rewards: Tensor
    accuracy: Tensor


class _Scores(NamedTuple):
    """[S] each, fp64: the score of a sequence, the divergence that is added to it, the log-prob of the reference, where
    margins are sorted, and the rewards, without gradient."""

    score: Tensor
    divergence: Tensor | None
    reference: Tensor | None
    rewards: Tensor


@ranged
def preference(inputs: PreferenceInputs, logp: Tensor, divergence: Tensor | None) -> Result:
    """Of log-probs and divergences [N]."""
    scores = _scores(inputs, logp, divergence)
    values, rewards = _of_pairs(inputs, scores) if inputs.desirable is None else _of_labels(inputs, scores)
    if inputs.pair_weight is not None:
        values = values * inputs.pair_weight
    loss = values.sum() / (max(values.numel(), 1) if inputs.normalizer is None else inputs.normalizer)
    nll_tokens = inputs.nll_tokens()
    if nll_tokens is not None:
        total = -torch.where(nll_tokens, logp, 0).sum(dtype=torch.float64)
        count = nll_tokens.sum().clamp(min=1) if inputs.nll_normalizer is None else inputs.nll_normalizer
        loss = loss + inputs.row.nll * total / count
    return Result(loss.to(logp.dtype), rewards, _mean((rewards[2] > 0).double()))


def known(of: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
    """A value and its derivatives, elementwise in each of the inputs: what `of` returns of them."""
    transformed = torch._C._are_functorch_transforms_active()
    found: Tensor = (_KnownInTransforms if transformed else _Known).apply(of, *inputs)
    return found


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
        ctx.of, (value, *slopes) = of, of(*inputs)
        ctx.save_for_backward(*inputs, *slopes)
        return value.clone() if any(value is x for x in inputs) else value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them out a single time
        half = len(saved) // 2
        slopes = saved[half:]
        if torch.is_grad_enabled():  # once more, of the inputs, so that they may be differentiated again
            _, *slopes = ctx.of(*saved[:half])
        return None, *(grad * slope for slope in slopes)


class _KnownInTransforms(torch.autograd.Function):
    """For torch.func, which lets nothing be saved but inputs."""

    @staticmethod
    def forward(of: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
        value = of(*inputs)[0]
        return value.clone() if any(value is x for x in inputs) else value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.of = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(grad * slope for slope in ctx.of(*ctx.saved_tensors)[1:])


def _scores(inputs: PreferenceInputs, logp: Tensor, divergence: Tensor | None) -> _Scores:
    row, layout, ref_logp = inputs.row, inputs.layout, inputs.ref_logp
    plain = _sums(logp if ref_logp is None else logp - ref_logp, inputs.token_weight, layout)
    score = plain if type(row.score) is Score else known(row.score.of, plain)
    reference = None
    if row.coupling == "sorted_margins":
        reference = torch.zeros_like(plain) if ref_logp is None else _sums(ref_logp, inputs.token_weight, layout)
    more = None if divergence is None else _sums(divergence, inputs.divergence_weight, layout)
    if row.statistic == "mean" or row.length > 0:
        counts = spans_of("sequence", layout).counts()
        if row.statistic == "mean":
            length = counts.clamp(min=1)
            plain, score = plain / length, score / length
            reference = None if reference is None else reference / length
        if row.length > 0:
            score = score + row.length / row.link.beta * counts
    rewards = row.link.beta * (plain if more is None else plain + more).detach()
    return _Scores(score, None if more is None else row.divergence * more, reference, rewards)


def _sums(x: Tensor, weight: Tensor | None, layout: Layout) -> Tensor:
    """fp64 [S] of x [N] over the tokens of each sequence that take part; others may hold anything."""
    valid = layout.valid()
    x = torch.where(valid, x, 0)
    x = x if weight is None else x * torch.where(valid, weight, 0)
    if layout.width is not None:
        return x.view(layout.shape).sum(1, dtype=torch.float64)
    return spans_of("sequence", layout).sum(x.double())


def _of_pairs(inputs: PreferenceInputs, scores: _Scores) -> tuple[Tensor, Tensor]:
    """The losses [P] and the rewards [3, P]."""
    row = inputs.row
    won, lost = _by_side(inputs, scores.score)
    if scores.divergence is not None:
        more, other = _by_side(inputs, scores.divergence)
        won, lost = won + (more.detach() if row.divergence_flow == "rejected" else more), lost + other
    if row.coupling == "sorted_scores":
        won, lost = won.sort().values, lost.sort().values
    elif row.coupling == "sorted_margins":
        assert scores.reference is not None
        ref_won, ref_lost = _by_side(inputs, scores.reference)
        won, lost = (won + ref_won - lost - ref_lost).sort().values, (ref_won - ref_lost).sort().values
    rewards = _by_side(inputs, scores.rewards)
    return known(row.link.of, won, lost), torch.stack([*rewards, rewards[0] - rewards[1]])


def _by_side(inputs: PreferenceInputs, x: Tensor) -> tuple[Tensor, Tensor]:
    """[P] each, of chosen and rejected sequences, of x [S]."""
    if inputs.pairs is None:  # views
        return x[: len(x) // 2], x[len(x) // 2 :]
    return x[inputs.pairs[:, 0]], x[inputs.pairs[:, 1]]


def _of_labels(inputs: PreferenceInputs, scores: _Scores) -> tuple[Tensor, Tensor]:
    """The losses [S] and the rewards [3, S]."""
    link, desirable = inputs.row.link, inputs.desirable
    assert isinstance(link, OfLabels) and desirable is not None
    base = _mean(scores.score.detach()) if inputs.base is None else inputs.base
    values = known(lambda x: link.of_labelled(x, desirable, base), scores.score)
    good, bad = (torch.where(side, scores.rewards, torch.nan) for side in (desirable, ~desirable))
    distance = scores.rewards - link.beta * base
    return values, torch.stack([good, bad, torch.where(desirable, distance, -distance)])


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)
