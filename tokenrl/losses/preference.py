"""preference_loss: a row of the table of preference objectives on a batch of chosen and rejected sequences."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch.checks import check_floats
from ..batch.layout import Layout, layout_of
from ..batch.spans import spans_of
from ..objectives.links import OfLabels, Score
from ..objectives.preference import Preference, preference
from ..observed import observed
from .preference_arguments import PreferenceInputs, check_needed, preference_inputs


class PreferenceMetrics(NamedTuple):
    """Without gradient, on the device: nothing waits for it until a number is read.

    chosen_rewards, rejected_rewards: [P], beta times the row's statistic, with the divergences of a row that has them.
    margins: [P], their difference. accuracy: 0-d, the share of pairs whose margin is above 0. Of labelled sequences the
    first three are [S], NaN where there is none: rewards on their own side, margins to beta kl or the reward shift,
    those of undesirable sequences with their sign turned.
    """

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor


class _Scores(NamedTuple):
    """[S] each, fp64: the score of a sequence, the divergence that is added to it, the log-prob of the reference, where
    margins are sorted, and the rewards, without gradient."""

    score: Tensor
    divergence: Tensor | None
    reference: Tensor | None
    rewards: Tensor


@observed
def preference_loss(
    objective: str | Preference,
    logp: Tensor,
    ref_logp: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    pairs: Tensor | None = None,
    desirable: Tensor | None = None,
    kl: float | Tensor | None = None,
    reward_shift: float | Tensor | None = None,
    divergence: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence_weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    nll_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
) -> tuple[Tensor, PreferenceMetrics]:
    """The loss of a policy on pairs of sequences, of which one is preferred, or on labelled ones.

        x(y) = sum_t w_t (logp_t - ref_logp_t), for means over its tokens;
               + divergence sum_t v_t D_t + length |y| / beta, of rows that have these
        loss = sum_p c_p link(x_w, x_l) / P + nll mean_t -logp_t

    logp, divergence, token_weight and divergence_weight get gradients where they require them. Sums are fp64.

    Args:
        objective: a name in tokenrl.PREFERENCES, or what tokenrl.preference(name, ...) returns.
        logp: fp32 or fp64, padded [B, T], or packed [N] with cu_seqlens [S + 1]: log-probs of all sequences, by
            token_logprobs or linear_token_logprobs.
        ref_logp: of the reference, of the same shape, constant; None for rows without one.
        mask: bool, the tokens of the answers; masked cells may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        pairs: integers [P, 2], of each pair the chosen and the rejected sequence; None: halves, sequence i of the first
            half is chosen and meets sequence i of the second. Sequences that no pair names enter nothing but nll_mask.
        desirable: bool [S], of "kto", "apo_zero_unpaired" and "bco_unpaired", instead of pairs.
        kl: of "kto", what a log ratio is compared with, max(0, mean kl): a number, a 0-d tensor, or the [K] log ratios
            of mismatched sequences. Constant.
        reward_shift: of "bco_unpaired", likewise, what rewards, beta times a log ratio, are compared with: their mean
            over the batches so far; None: that of this batch. Constant.
        divergence: of the tdpo and sparsepo rows, one per token, such as tokenrl.token_divergence(logits, ref_logits),
            KL of the reference to the policy.
        token_weight: w, of the shape of logp; None for 1.
        divergence_weight: v, likewise.
        pair_weight: constant, c of [P] ([S] of labelled sequences, such as BCO's weights by density ratio).
        nll_mask: bool of the tokens of the nll term; None: those of chosen sequences.
        normalizer: what to divide by instead of P.
        nll_normalizer: what to divide by instead of the number of tokens of the nll term.

    Returns:
        (loss 0-d in the dtype of logp, PreferenceMetrics).

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    row = preference(objective)
    check_floats("logp", logp)
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    check_needed(row, "divergence", divergence, row.divergence > 0)
    if divergence is not None:
        check_floats("divergence", divergence)
        divergence = layout.flat_tokens("divergence", divergence)
    inputs = preference_inputs(
        row, layout, ref_logp=ref_logp, pairs=pairs, desirable=desirable, kl=kl, reward_shift=reward_shift,
        token_weight=token_weight, divergence_weight=divergence_weight, pair_weight=pair_weight, nll_mask=nll_mask,
        normalizer=normalizer, nll_normalizer=nll_normalizer,
    )  # fmt: skip
    return evaluate(inputs, logp.reshape(-1), divergence)


def evaluate(inputs: PreferenceInputs, logp: Tensor, divergence: Tensor | None) -> tuple[Tensor, PreferenceMetrics]:
    """The loss of log-probs and divergences [N]."""
    scores = _scores(inputs, logp, divergence)
    values, metrics = _of_labels(inputs, scores) if inputs.pairs is None else _of_pairs(inputs, scores)
    if inputs.pair_weight is not None:
        values = values * inputs.pair_weight
    loss = values.sum() / inputs.normalizer
    if inputs.nll_tokens is not None:
        total = -torch.where(inputs.nll_tokens, logp, 0).sum(dtype=torch.float64)
        loss = loss + inputs.row.nll * total / inputs.nll_normalizer
    return loss.to(logp.dtype), metrics


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
    """fp64 [S] of x [N] over the tokens of each sequence that take part; weight: 0 in the others."""
    x = torch.where(layout.valid(), x, 0)
    x = x if weight is None else x * weight
    if layout.width is not None:
        return x.view(layout.shape).sum(1, dtype=torch.float64)
    return spans_of("sequence", layout).sum(x.double())


def _of_pairs(inputs: PreferenceInputs, scores: _Scores) -> tuple[Tensor, PreferenceMetrics]:
    """The losses [P]."""
    row = inputs.row
    won, lost = _sides(inputs, scores.score)
    if scores.divergence is not None:
        more, other = _sides(inputs, scores.divergence)
        won, lost = won + (more.detach() if row.divergence_flow == "rejected" else more), lost + other
    if row.coupling == "sorted_scores":
        won, lost = won.sort().values, lost.sort().values
    elif row.coupling == "sorted_margins":
        assert scores.reference is not None
        ref_won, ref_lost = _sides(inputs, scores.reference)
        won, lost = (won + ref_won - lost - ref_lost).sort().values, (ref_won - ref_lost).sort().values
    rewards = _sides(inputs, scores.rewards)
    margins = rewards[0] - rewards[1]
    return known(row.link.of, won, lost), PreferenceMetrics(*rewards, margins, _mean((margins > 0).double()))


def _sides(inputs: PreferenceInputs, x: Tensor) -> tuple[Tensor, Tensor]:
    """[P] each, of chosen and rejected sequences, of x [S]."""
    assert inputs.pairs is not None
    if inputs.halves:  # views
        return x[: len(x) // 2], x[len(x) // 2 :]
    return x[inputs.pairs[0]], x[inputs.pairs[1]]


def _of_labels(inputs: PreferenceInputs, scores: _Scores) -> tuple[Tensor, PreferenceMetrics]:
    """The losses [S]."""
    link, desirable = inputs.row.link, inputs.desirable
    assert isinstance(link, OfLabels) and desirable is not None
    base = _mean(scores.score.detach()) if inputs.base is None else inputs.base
    values = known(lambda x: link.of_labelled(x, desirable, base), scores.score)
    good, bad = (torch.where(side, scores.rewards, torch.nan) for side in (desirable, ~desirable))
    distance = scores.rewards - link.beta * base
    margins = torch.where(desirable, distance, -distance)
    return values, PreferenceMetrics(good, bad, margins, _mean((margins > 0).double()))


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)
