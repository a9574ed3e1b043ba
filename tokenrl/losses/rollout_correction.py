"""Rollout/training mismatch -> factors of the loss's token_weight and masks, without gradient.

The engine that sampled the tokens and the trainer give them different log-probs: q_t = logp_t - rollout_logp_t, logp
being the trainer's (old_logp where the loss has a ratio of its own to it). What trainers call the remedies:

    truncated importance sampling: TIS, verl rollout_is, TRL *_truncate   bound="truncate", high=2
    masked importance sampling: MIS, TRL sequence_mask, verl "0.5_3"      bound="mask", level="sequence", high=3
    IcePop: MIS of single tokens, TRL token_mask, verl "0.5_5"            bound="mask", level="token", low=0.5, high=5
    "sequence" of verl, TRL, ROLL: the product of a row's ratios          level="sequence"
    "sequence" of swift, NeMo, OpenRLHF; "geometric" of ROLL: their mean  level="geometric"
    verl rollout_rs                                                       rejection_mask, joined by &
    seq-mask-tis of NeMo, OpenRLHF, swift: token weights of the rows whose geometric mean lies in [low, high]
        importance_weights(..., bound="none") * rejection_mask(..., statistic="seq_mean_k1", low=1 / high, high=1 / low)
        NeMo's; a token's weight may be e^20 then, where bound="truncate", high=2 bounds it
    binary_kl and tv of OpenRLHF, FlashREINFORCE's seq gate               rejection_mask, "seq_mean_binary_kl" for one
    OPSM of DeepSeek-V3.2, TRL off_policy_mask_threshold                  off_policy_sequence_mask
    80/20 rule, TRL top_entropy_quantile                                  top_entropy_mask

Weights and masks multiply: policy_loss(..., token_weight=weights * kept). Rejected tokens then stay in the count that
the loss is divided by (as in slime and AReaL); handed in as the loss's mask they leave it, and the ratios too.

Tensors are padded [B, T] with a bool mask, or packed [N] with cu_seqlens [S + 1]; results have that shape, and are 0 or
False in masked cells, which may hold anything. All is computed in fp64.

unknown says what a NaN in rollout_logp is, a token that the engine did not score: "raise", an error (on a GPU, where a
look at it were a sync, it stays NaN in weights and is False in masks, as a NaN in logp does everywhere); "neutral", the
trainer's own log-prob, so a ratio of 1.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_floats, check_integers, check_name, check_number, values_known
from ..batch.layout import Layout, layout_of
from ..batch.spans import Spans, spans_of
from ..errors import wrong
from ..methods.top_entropy import entropy_threshold, top_entropy_mask
from ..objectives.excess import excess

__all__ = [
    "entropy_threshold", "importance_weights", "off_policy_sequence_mask", "rejection_mask", "top_entropy_mask",
]  # fmt: skip

Divergence = Callable[..., Tensor]
LEVELS = {  # the span that shares a weight, and what is taken of its log ratios
    "token": ("token", "sum"),
    "sequence": ("sequence", "sum"),
    "geometric": ("sequence", "mean"),
    "segment": ("segment", "mean"),
}
UNKNOWN = ("raise", "neutral")
BOUNDS = ("truncate", "mask", "none")
NORMALIZATIONS = ("none", "batch")
CLAMP = 20.0
LEAST = 1e-6  # of a probability, and of 1 less it, in a divergence of taking the token or not


def _of_ratio(divergence: Divergence) -> Divergence:
    """Of x = q clamped to +-CLAMP."""
    return lambda trained, sampled: divergence((trained - sampled).clamp(-CLAMP, CLAMP))


def _of_taking(divergence: Divergence) -> Divergence:
    """Of the probabilities of the token under the rollout's policy and the trainer's."""
    return lambda trained, sampled: divergence(*(x.exp().clamp(LEAST, 1 - LEAST) for x in (sampled, trained)))


DIVERGENCES: dict[str, Divergence] = {  # of log-probs of trainer and rollout; k1 is the log of rollout / train
    "k1": _of_ratio(lambda x: -x),
    "k2": _of_ratio(lambda x: 0.5 * x.square()),
    "k3": _of_ratio(excess),
    "tv": _of_taking(lambda mu, p: (mu - p).abs()),
    "binary_kl": _of_taking(lambda mu, p: mu * (mu / p).log() + (1 - mu) * ((1 - mu) / (1 - p)).log()),
}
REJECTIONS = {  # statistic -> span, what is taken over it, divergence
    **{f"token_{k}": ("token", "sum", k) for k in DIVERGENCES},
    **{f"seq_sum_{k}": ("sequence", "sum", k) for k in ("k1", "k2", "k3")},
    **{f"seq_mean_{k}": ("sequence", "mean", k) for k in DIVERGENCES},
    **{f"seq_max_{k}": ("sequence", "max", k) for k in ("k2", "k3")},
}


def _log_probs(
    logp: Tensor, rollout_logp: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, unknown: str
) -> tuple[Layout, Tensor, Tensor]:
    """(layout, logp, rollout_logp), float64 [N], both 0 in masked cells and where the rollout's is taken for logp's."""
    check_name("unknown", unknown, UNKNOWN)
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    given = (("logp", logp), ("rollout_logp", rollout_logp))
    for name, x in given:
        check_floats(name, x)
        check_constant(name, x)
    trained, sampled = (layout.flat_tokens(name, x, torch.float64) for name, x in given)
    missing, counts = sampled.isnan(), layout.valid()
    if unknown == "neutral":
        counts = counts & ~missing
    elif values_known(missing) and (count := (missing & counts).sum()):
        raise wrong("rollout_logp", f"NaN for {count} tokens", "numbers, or unknown='neutral' for a ratio of 1 there")
    return layout, torch.where(counts, trained, 0.0), torch.where(counts, sampled, 0.0)


def _log_ratios(*given: Any) -> tuple[Layout, Tensor]:
    """(layout, q = logp - rollout_logp) of _log_probs' arguments."""
    layout, trained, sampled = _log_probs(*given)
    return layout, trained - sampled


def _check_range(low: float | None, high: float | None, least: float = 0.0) -> None:
    for name, x in (("low", low), ("high", high)):
        if x is not None:
            check_number(name, x, least, accepted=f"a number, at least {least:g}, or None")
    if low is not None and high is not None and low > high:
        raise wrong("low", low, f"at most high, {high}")


def _check_bounds(bound: str, low: float | None, high: float | None) -> None:
    check_name("bound", bound, BOUNDS)
    if bound == "none" and (low is not None or high is not None):
        raise wrong("low" if high is None else "high", low if high is None else high, "None where bound is 'none'")
    if bound == "truncate" and high is None:
        raise wrong("high", None, "a number for bound 'truncate' (verl: 2), or bound='none'")
    if bound == "mask" and low is None and high is None:
        raise wrong("high", None, "low, high or both for bound 'mask' (TRL: high=3), or bound='none'")
    _check_range(low, high)


def _bounded(weight: Tensor, bound: str, low: float | None, high: float | None) -> Tensor:
    if bound == "none":
        return weight
    if bound == "truncate":
        return weight.clamp(min=low, max=high)
    # The weights outside are named, not those inside: a NaN is in neither, and must stay.
    outside = (weight < (0.0 if low is None else low)) | (weight > (torch.inf if high is None else high))
    return torch.where(outside, 0.0, weight)


def _over_mean(weight: Tensor, spans: Spans) -> Tensor:
    filled = spans.counts() > 0
    mean = torch.where(filled, weight, 0.0).sum() / filled.sum().clamp(min=1)
    # A batch whose weights are all 0 keeps them.
    return weight / torch.where(mean == 0, 1.0, mean)


def importance_weights(
    logp: Tensor,
    rollout_logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    level: str = "token",
    segment_ids: Tensor | None = None,
    bound: str = "truncate",
    low: float | None = None,
    high: float | None = None,
    clamp: float | None = CLAMP,
    normalize: str = "none",
    unknown: str = "raise",
) -> Tensor:
    """Importance weights of the rollout's tokens, w_t = bound(exp(clamp(s_t))), of logp's shape and dtype.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, the trainer's, a constant.
        rollout_logp: of that shape; q = logp - rollout_logp.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1].
        level: s_t is "token" q_t, "sequence" sum of q over the row, "geometric" mean of q over the row, "segment" mean
            of q over the token's segment.
        segment_ids: integers of logp's shape: a run of equal ones among the row's valid tokens is a segment.
        bound: "truncate" min(w, high), and max(., low) if given; "mask" w where low <= w <= high, else 0; "none" w.
        low: a ratio, or None.
        high: a ratio, or None.
        clamp: s is clamped to [-clamp, clamp] before exp (the sum or mean, not its terms), None does not.
        normalize: "batch" divides the bounded weights by their mean over the spans with a valid token; the only option
            that looks beyond a row, so a split batch gives other weights.
        unknown: of a NaN in rollout_logp, "raise" or "neutral".

    Source: verl rollout_correction for "token" and "sequence"; TRL, ROLL for the bounds and the other levels
    (trainers).
    """
    check_name("level", level, LEVELS)
    check_name("normalize", normalize, NORMALIZATIONS)
    _check_bounds(bound, low, high)
    if clamp is not None:
        check_number("clamp", clamp, above=0, accepted="a positive number, or None")
    layout, q = _log_ratios(logp, rollout_logp, mask, cu_seqlens, unknown)
    kind, what = LEVELS[level]
    spans = spans_of(kind, layout, _segments(level, segment_ids, layout))
    s = spans.take(what, q)
    weight = _bounded((s if clamp is None else s.clamp(-clamp, clamp)).exp(), bound, low, high)
    if normalize == "batch":
        weight = _over_mean(weight, spans)
    return torch.where(layout.valid(), weight[spans.index], 0.0).to(logp.dtype).view(layout.shape)


def _segments(level: str, segment_ids: Tensor | None, layout: Layout) -> Tensor | None:
    if level != "segment":
        if segment_ids is not None:
            raise wrong("segment_ids", "a tensor", f"None where level is {level!r} (level='segment' uses them)")
        return None
    if segment_ids is None:
        raise wrong("segment_ids", None, f"one integer per token, {list(layout.shape)}; level 'segment' needs it")
    check_integers("segment_ids", segment_ids)
    return layout.flat_tokens("segment_ids", segment_ids)


def rejection_mask(
    logp: Tensor,
    rollout_logp: Tensor,
    *,
    statistic: str,
    low: float | None = None,
    high: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    unknown: str = "raise",
) -> Tensor:
    """bool of logp's shape: the valid tokens whose statistic, or whose row's, lies within the bounds, ends kept.

    With x = q clamped to +-20 token by token, k1 = -x, k2 = x^2 / 2, k3 = e^x - 1 - x; with mu = exp(rollout_logp) and
    p = exp(logp), both within [1e-6, 1 - 1e-6], tv = |mu - p|, binary_kl = mu log(mu / p) + (1 - mu) log((1 - mu) /
    (1 - p)), the divergences of taking the token or not. Several criteria: the & of several calls.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, the trainer's, a constant.
        rollout_logp: of that shape.
        statistic: "token_", "seq_mean_" and the name of any, "seq_sum_" and k1, k2, k3, "seq_max_" and k2, k3.
        low: of *_k1 alone: low <= exp(statistic). This ratio is rollout / train, the inverse of importance_weights', as
            in verl: to keep train / rollout in [a, b], low=1 / b, high=1 / a.
        high: of *_k1 exp(statistic) <= high, of the others statistic <= high.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1].
        unknown: as for importance_weights.

    Source: verl; tv, binary_kl: OpenRLHF (trainers).
    """
    check_name("statistic", statistic, REJECTIONS)
    kind, what, k = REJECTIONS[statistic]
    if k != "k1" and low is not None:
        raise wrong("low", low, f"None for {statistic!r}: a divergence has an upper bound only")
    if high is None and low is None:
        raise wrong("high", None, f"a number for {statistic!r}")
    _check_range(low, high)
    layout, trained, sampled = _log_probs(logp, rollout_logp, mask, cu_seqlens, unknown)
    spans = spans_of(kind, layout)
    found = spans.take(what, DIVERGENCES[k](trained, sampled))
    if k == "k1":
        low, high = (_log(x, none) for x, none in ((low, -torch.inf), (high, torch.inf)))
        kept = (found >= low) & (found <= high)
    else:
        kept = found <= (torch.inf if high is None else high)
    return (kept[spans.index] & layout.valid()).view(layout.shape)


def _log(x: float | None, none: float) -> float:
    if x is None:
        return none
    return math.log(x) if x > 0 else -torch.inf


def off_policy_sequence_mask(
    logp: Tensor,
    rollout_logp: Tensor,
    advantages: Tensor,
    *,
    advantages_per: str | None = None,
    threshold: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    unknown: str = "raise",
) -> Tensor:
    """bool of logp's shape, OPSM: False for rows with A < 0 and mean(rollout_logp - logp) > threshold.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, the trainer's, a constant.
        rollout_logp: of that shape.
        advantages: [B] (or [S]), or one per token, where only the tokens with A < 0 of such a row are dropped, as in
            TRL.
        advantages_per: as for policy_loss.
        threshold: nats per token.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1].
        unknown: as for importance_weights.

    Source: DeepSeek-V3.2, arXiv 2512.02556; TRL off_policy_mask_threshold, 0.5 (trainers).
    """
    check_number("threshold", threshold, accepted="a number, in nats per token")
    layout, q = _log_ratios(logp, rollout_logp, mask, cu_seqlens, unknown)
    check_constant("advantages", advantages)
    advantages = layout.of_tokens("advantages", advantages, torch.float64, advantages_per)
    rows = spans_of("sequence", layout)
    near = (rows.mean(-q) <= threshold)[rows.index]
    return ((near | (advantages >= 0)) & layout.valid()).view(layout.shape)
