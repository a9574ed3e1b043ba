"""preference_loss: a row of the table of preference objectives on a batch of chosen and rejected sequences."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch.checks import as_saved, as_scalar, check_constant, check_floats, check_number, check_tensor
from ..batch.layout import Layout, layout_of
from ..batch.pairs import as_pairs
from ..batch.spans import spans_of
from ..errors import wrong
from ..objectives.links import Kto
from ..objectives.preference import Preference, preference
from ..observed import observed


class PreferenceMetrics(NamedTuple):
    """Without gradient, on the device: nothing waits for it until a number is read.

    chosen_rewards, rejected_rewards: [P], beta times the row's statistic, with the divergences of a row that has them.
    margins: [P], their difference. accuracy: 0-d, the share of pairs whose margin is above 0. Of labelled sequences the
    first three are [S], NaN where there is none: rewards on their own side, margins to beta kl, those of undesirable
    sequences with their sign turned.
    """

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor


class _Scores(NamedTuple):
    """[S] each, fp64: the score of a sequence, the divergence that is added to it, the log-prob of the reference, 0
    where nothing but log ratios counts, and the rewards, without gradient."""

    score: Tensor
    divergence: Tensor
    reference: Tensor
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
    divergence: Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence_weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    nll_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
) -> tuple[Tensor, PreferenceMetrics]:
    """The loss of a policy on pairs of sequences, of which one is preferred, or on labelled ones.

        x(y) = sum_t w_t (logp_t - ref_logp_t), for means over its tokens;  + factor sum_t v_t D_t where the row says so
        loss = sum_p c_p link(x_w, x_l) / P + nll mean_t -logp_t

    objective: a name in tokenrl.PREFERENCES, or what tokenrl.preference(name, ...) returns.
    logp: fp32 or fp64, padded [B, T], or packed [N] with cu_seqlens [S + 1]: log-probs of all sequences, by
    token_logprobs or linear_token_logprobs. ref_logp: of the reference, of the same shape, constant; None for rows
    without one. mask: bool, the tokens of the answers; masked cells may hold anything.
    pairs: integers [P, 2], of each pair the chosen and the rejected sequence; None: halves, sequence i of the first
    half is chosen and meets sequence i of the second. Sequences that no pair names enter nothing but nll_mask.
    desirable, kl: of "kto" and "apo_zero_unpaired", instead of pairs: bool [S], and what a log ratio is compared with,
    max(0, mean kl), detached: a number, a 0-d tensor, or the [K] log ratios of mismatched sequences.
    divergence: of the tdpo and sparsepo rows, one per token, such as tokenrl.token_divergence(logits, ref_logits), KL
    of the reference to the policy. token_weight, divergence_weight: w, v of the shape of logp, None for 1.
    pair_weight: constant, c of [P] ([S] of labelled sequences). nll_mask: bool of the tokens of the nll term; None:
    those of chosen sequences. normalizer, nll_normalizer: what to divide by instead of P and of the number of tokens.

    logp, divergence, token_weight and divergence_weight get gradients where they require them. Sums are fp64.
    Returns (loss 0-d in the dtype of logp, PreferenceMetrics).
    Errors: ValueError naming the argument, what was given and what is accepted.
    """
    row = preference(objective)
    check_floats("logp", logp)
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    labelled = row.coupling == "labels"
    for name, given, wanted in (
        ("ref_logp", ref_logp, row.reference == "given"), ("divergence", divergence, row.divergence > 0),
        ("desirable", desirable, labelled), ("kl", kl, isinstance(row.link, Kto) and row.link.uses_kl),
    ):  # fmt: skip
        if wanted and given is None:
            raise wrong(name, None, f"one; objective {row.name!r} needs it")
        _check_used(row, name, given, wanted)
    _check_used(row, "divergence_weight", divergence_weight, row.divergence > 0)
    _check_used(row, "pairs", pairs, not labelled)
    _check_used(row, "nll_mask", nll_mask, row.nll > 0)
    _check_used(row, "nll_normalizer", nll_normalizer, row.nll > 0)
    _check_used(row, "pair_weight", pair_weight, not row.coupling.startswith("sorted"))
    scores = _scores(row, layout, logp, ref_logp, divergence, token_weight, divergence_weight)
    if desirable is not None:
        chosen = _labels(desirable, layout)
        values, metrics = _of_labels(row, scores, chosen, kl)
    else:
        first, second = as_pairs(pairs, layout)
        values, metrics = _of_pairs(row, scores, first, second)
        chosen = torch.zeros_like(scores.rewards, dtype=torch.bool).index_fill_(0, first, True)
    if pair_weight is not None:
        values = values * _pair_weight(pair_weight, values)
    loss = values.sum() / _count("normalizer", normalizer, max(values.numel(), 1), values)
    if row.nll > 0:
        loss = loss + row.nll * _nll(layout, logp, chosen, nll_mask, nll_normalizer)
    return loss.to(logp.dtype), metrics


class _Known(torch.autograd.Function):
    """A value and its derivatives, elementwise in each of the inputs: what `of` returns of them."""

    @staticmethod
    def forward(ctx: Any, of: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> Tensor:
        ctx.of = of
        ctx.save_for_backward(*inputs)
        return of(*inputs)[0].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, *slopes = ctx.of(*ctx.saved_tensors)  # few numbers; of the inputs, so that they may be differentiated again
        return None, *(grad * slope for slope in slopes)


def _scores(
    row: Preference, layout: Layout, logp: Tensor, ref_logp: Tensor | None, divergence: Tensor | None,
    token_weight: Tensor | None, divergence_weight: Tensor | None,
) -> _Scores:  # fmt: skip
    if ref_logp is not None:
        check_floats("ref_logp", ref_logp)
        check_constant("ref_logp", ref_logp)
        ref_logp = layout.flat_tokens("ref_logp", ref_logp)
    ratio = logp.reshape(-1) if ref_logp is None else logp.reshape(-1) - ref_logp
    token_weight = _flat_weight("token_weight", token_weight, layout)
    length = spans_of("sequence", layout).counts().clamp(min=1) if row.statistic == "mean" else 1
    plain = _sums(ratio, token_weight, layout)
    score = _Known.apply(row.score.of, plain) / length
    reference = more = torch.zeros_like(plain)
    if ref_logp is not None and row.coupling == "sorted_margins":
        reference = _sums(ref_logp, token_weight, layout) / length
    if divergence is not None:
        check_floats("divergence", divergence)
        weight = _flat_weight("divergence_weight", divergence_weight, layout)
        more = _sums(layout.flat_tokens("divergence", divergence), weight, layout)
    rewards = row.link.beta * (plain / length + more).detach()
    return _Scores(score, row.divergence * more, reference, rewards)


def _flat_weight(name: str, weight: Tensor | None, layout: Layout) -> Tensor | None:
    if weight is None:
        return None
    check_floats(name, weight)
    return torch.where(layout.valid(), layout.flat_tokens(name, weight), 0)


def _sums(x: Tensor, weight: Tensor | None, layout: Layout) -> Tensor:
    """fp64 [S] of x [N] over the tokens of each sequence that take part; weight: 0 in the others."""
    x = torch.where(layout.valid(), x, 0)
    x = x if weight is None else x * weight
    if layout.width is not None:
        return x.view(layout.shape).sum(1, dtype=torch.float64)
    return spans_of("sequence", layout).sum(x.double())


def _of_pairs(row: Preference, scores: _Scores, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, PreferenceMetrics]:
    """The losses [P]."""
    more = scores.divergence.detach() if row.divergence_flow == "rejected" else scores.divergence
    won, lost = (scores.score + more)[chosen], (scores.score + scores.divergence)[rejected]
    if row.coupling == "sorted_scores":
        won, lost = won.sort().values, lost.sort().values
    elif row.coupling == "sorted_margins":
        policy = scores.score + scores.reference
        won, lost = ((x[chosen] - x[rejected]).sort().values for x in (policy, scores.reference))
    rewards = scores.rewards[chosen], scores.rewards[rejected]
    margins = rewards[0] - rewards[1]
    return _Known.apply(row.link.of, won, lost), PreferenceMetrics(*rewards, margins, _mean((margins > 0).double()))


def _of_labels(
    row: Preference, scores: _Scores, desirable: Tensor, kl: float | Tensor | None
) -> tuple[Tensor, PreferenceMetrics]:
    """The losses [S]."""
    assert isinstance(row.link, Kto)
    link, base = row.link, _kl(kl, scores.score)
    values = _Known.apply(lambda x: link.of_labelled(x, desirable, base), scores.score)
    good, bad = (torch.where(side, scores.rewards, torch.nan) for side in (desirable, ~desirable))
    distance = scores.rewards - link.beta * base
    margins = torch.where(desirable, distance, -distance)
    return values, PreferenceMetrics(good, bad, margins, _mean((margins > 0).double()))


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)


def _kl(kl: float | Tensor | None, like: Tensor) -> Tensor:
    """0-d, at least 0."""
    if kl is None:
        return like.new_zeros(())
    if not isinstance(kl, Tensor):
        check_number("kl", kl)
        return like.new_full((), max(kl, 0.0))
    check_constant("kl", kl)
    if kl.dim() > 1 or kl.numel() == 0:
        raise wrong("kl", f"shape {list(kl.shape)}", "a number, a 0-d tensor, or the [K] log ratios of other sequences")
    return kl.to(like).mean().clamp(min=0)


def _labels(desirable: Tensor, layout: Layout) -> Tensor:
    check_tensor("desirable", desirable)
    if desirable.dtype != torch.bool:
        raise wrong("desirable", f"dtype {desirable.dtype}", "torch.bool (desirable.bool() if it holds zeros and ones)")
    return layout.flat_sequences("desirable", desirable, torch.bool)


def _pair_weight(weight: Tensor, values: Tensor) -> Tensor:
    check_floats("pair_weight", weight)
    check_constant("pair_weight", weight)
    if weight.shape != values.shape or weight.device != values.device:
        given = f"{list(weight.shape)} on {weight.device}"
        raise wrong("pair_weight", given, f"{list(values.shape)} on {values.device}, one per loss")
    return as_saved(weight).double()


def _nll(
    layout: Layout, logp: Tensor, chosen: Tensor, nll_mask: Tensor | None, normalizer: float | Tensor | None
) -> Tensor:
    tokens = layout.valid() & layout.spread(chosen)
    if nll_mask is not None:
        tokens = layout_of(logp, mask=nll_mask, cu_seqlens=layout.cu_seqlens if layout.width is None else None).valid()
    total = -torch.where(tokens, logp.reshape(-1), 0).double().sum()
    return total / _count("nll_normalizer", normalizer, tokens.sum().clamp(min=1), total)


def _count(name: str, given: float | Tensor | None, own: int | Tensor, like: Tensor) -> float | Tensor:
    """What a sum is divided by; a tensor is 0-d."""
    if given is None:
        return own
    if isinstance(given, Tensor):
        return as_saved(as_scalar(name, given, like))
    check_number(name, given, above=0)
    return given


def _check_used(row: Preference, name: str, given: object, used: bool) -> None:
    if given is not None and not used:
        raise wrong(name, "one", f"None; objective {row.name!r} has no use for it")
