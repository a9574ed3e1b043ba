"""Bounds of the ratio and entropy scores per token, without gradient, for the objectives' parameters.

    eps_low, eps_high = bandpo(old_logp, mask=mask)
    policy_loss(objective("ppo", eps_low=eps_low, eps_high=eps_high), ...)

The clip is to [1 - eps_low, 1 + eps_high]. Tensors are padded [B, T] with a bool mask, or packed [N] with cu_seqlens
[S + 1]; results have that shape, and are 0 in masked cells, which may hold anything. All is computed in fp64. What
looks beyond a row takes the statistics of the whole batch, so that its parts get the same numbers. Tags: [C] authors'
code, [R] our reading.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import unknown, wrong
from .layout import check_integers, layout_of
from .reward_groups import Groups
from .spans import spans_of
from .valid import ValidTokens, constant, valid_of

KINDS = ("tv", "chi2", "kl")
SCOPES = ("sequence", "batch")
EDGE = 1e-6
HALVINGS = 60
EQUAL = 1e-8
FLOOR = 1e-8


def _check_number(name: str, x: float, least: float, most: float = math.inf) -> None:
    if not least <= x <= most:
        accepted = f"a number, at least {least:g}" if most == math.inf else f"a number in [{least:g}, {most:g}]"
        raise wrong(name, x, accepted)


def bandpo(
    old_logp: Tensor, *, kind: str = "kl", delta: float = 0.05, eps_low: float = 0.2, eps_high: float = 0.28,
    relax: bool = True, ceiling: float = 100.0, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(eps_low, eps_high) of old_logp's shape and dtype: ratios that stay in a trust region of size delta, BandPO [C].

    The token's probability moves from p to r p and all others scale alike, which changes the distribution by
        kind "tv"    p |r - 1|                                        eps = delta / p
        kind "chi2"  (r - 1)^2 p / (1 - p)                            eps = sqrt(delta (1 - p) / p)
        kind "kl"    -p log r - (1 - p) log((1 - r p) / (1 - p))      by bisection
    at most delta, r in [0, 1 / p]. The authors' limits (eps_low, eps_high) at the ends: (1, 1 / p - 1) below p = 1e-6,
    and above 1 - 1e-6 (delta, 0), (0, 0), (1 - e^-delta, 0) for the three kinds.
    "kl" is the code's default. relax: the window is at least eps_low, eps_high, those of a plain clip. 1 + eps_high is
    at most ceiling. NaN stays.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    if not 0 < delta < math.inf:
        raise wrong("delta", delta, "a positive number")
    _check_number("eps_low", eps_low, 0, 1)
    _check_number("eps_high", eps_high, 0)
    _check_number("ceiling", ceiling, 1)
    valid = valid_of(old_logp, mask, cu_seqlens, "old_logp")
    logp = valid.take("old_logp", old_logp)
    low, high = _band(kind, delta, logp.exp(), -logp.expm1())
    if relax:
        low, high = low.clamp(min=eps_low), high.clamp(min=eps_high)
    high = high.clamp(max=ceiling - 1)
    low, high = (torch.where(logp.isnan(), logp, x) for x in (low, high))
    return valid.put(low, old_logp.dtype), valid.put(high, old_logp.dtype)


def _band(kind: str, delta: float, p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - lowest ratio, highest ratio - 1) of tokens of probability p = 1 - rest."""
    if kind == "tv":
        low = high = delta / p
        sure = min(delta, 1.0)
    elif kind == "chi2":
        low = high = (delta * rest / p).sqrt()
        sure = 0.0
    else:
        low, high = _kl_share(rest, p, delta), _kl_share(p, rest, delta) * rest / p
        sure = -math.expm1(-delta)
    low, high = low.clamp(max=1), torch.minimum(high, rest / p)
    low = torch.where(p < EDGE, 1.0, torch.where(rest < EDGE, sure, low))
    return low, torch.where(p < EDGE, 1 / p.clamp(min=1e-12) - 1, torch.where(rest < EDGE, 0.0, high))


def _kl_share(p: Tensor, rest: Tensor, delta: float) -> Tensor:
    """The v in [0, 1] where taking the share v of what the others hold, rest = 1 - p, costs a KL of delta."""
    low, high = torch.zeros_like(p), torch.ones_like(p)
    for _ in range(HALVINGS):
        v = (low + high) / 2
        inside = -p * (v * rest / p).log1p() - rest * (-v).log1p() < delta
        low, high = torch.where(inside, v, low), torch.where(inside, high, v)
    return (low + high) / 2


def segment_ids(
    ids: Tensor, delimiters: Iterable[int] | Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """int64 of ids' shape: the (sub)sentence of each token, counted from 0 in its sequence; SSPO (arXiv 2511.04256).

    A token whose id is among delimiters ends its span and belongs to it, so two in a row make a span of one; what
    follows the last one is a span as well. A masked cell ends no span, whatever it holds. Which ids end a sentence, or
    a clause, is the tokenizer's matter: one that holds the mark with other text must be listed as well. [R]
    """
    layout = layout_of(ids, mask=mask, cu_seqlens=cu_seqlens, name="ids")
    check_integers("ids", ids)
    if isinstance(delimiters, int):
        raise wrong("delimiters", delimiters, f"several ids: [{delimiters}]")
    marks = torch.as_tensor(delimiters if isinstance(delimiters, Tensor) else list(delimiters), device=ids.device)
    if marks.numel():
        check_integers("delimiters", marks)
    valid, rows = layout.valid(), spans_of("sequence", layout).index
    ends = valid & torch.isin(layout.tokens("ids", ids, torch.int64), marks.to(torch.int64))
    before = torch.cat([ends.new_zeros(1), ends]).cumsum(0)
    number = before[:-1] - before[layout.cu_seqlens[:-1]][rows]
    return torch.where(valid, number, 0).view(layout.shape)


def entropy_range(
    entropy: Tensor, segment_ids: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(lowest, highest) mean entropy of a span of the batch, fp64, 0-d; inf, -inf if there is none. For entropy_bounds
    on a batch in parts: the minimum and the maximum of what the parts give."""
    _, means = _span_means(entropy, segment_ids, mask, cu_seqlens)
    infinity = means.new_full((1,), torch.inf)
    return torch.cat([means, infinity]).amin(), torch.cat([means, -infinity]).amax()


def _span_means(
    entropy: Tensor, segment_ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[ValidTokens, Tensor]:
    """The valid tokens and, for each, the mean of its span."""
    valid = valid_of(entropy, mask, cu_seqlens, "entropy")
    x = valid.take("entropy", entropy)
    check_integers("segment_ids", segment_ids)
    spans = spans_of("segment", valid.layout, valid.layout.tokens("segment_ids", segment_ids))
    return valid, Groups(spans.index[valid.cells], spans.number).mean(x, torch.ones_like(x))


def entropy_bounds(
    entropy: Tensor, segment_ids: Tensor, *, eps_low: float, eps_high: float, low_factor: float = 0.5,
    high_factor: float = 1.5, scope: str = "sequence", mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    lowest: float | Tensor | None = None, highest: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(eps_low, eps_high) of entropy's shape and dtype: a wider window where a span is uncertain, SSPO (arXiv
    2511.04256).

        h_k = (H_k - min_j H_j) / (max_j H_j - min_j H_j),    f_k = low_factor + (high_factor - low_factor) h_k
        eps_low_k = eps_low f_k,    eps_high_k = eps_high f_k

    H_k: mean entropy of the span k, a run of equal segment_ids (integers of entropy's shape) among the valid tokens of
    a sequence. scope: minimum and maximum are those of the "sequence" or of the "batch"; lowest, highest: numbers in
    their place for "batch", entropy_range of the whole of a batch that comes in parts. Where they differ by 1e-8 or
    less (a sequence of one span) h is 1/2; h is kept in [0, 1].
    The source fixes that the window of a span grows with its entropy; the formula and its numbers are ours [R].
    """
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    for name, x in (("eps_low", eps_low), ("eps_high", eps_high), ("low_factor", low_factor)):
        _check_number(name, x, 0)
    _check_number("high_factor", high_factor, low_factor)
    valid, means = _span_means(entropy, segment_ids, mask, cu_seqlens)
    if lowest is None and highest is None:
        within = valid.row if scope == "sequence" else torch.zeros_like(valid.row)
        groups = Groups(within, valid.layout.num_sequences)
        least, most = -groups.max(-means), groups.max(means)
    else:
        least, most = _given_range(scope, lowest, highest, means)
    width = most - least
    # Means of equal entropies differ by rounding errors, which must not become 0 and 1.
    h = torch.where(width > EQUAL, (means - least) / width, torch.where(width.isnan(), width, 0.5)).clamp(0, 1)
    factor = low_factor + (high_factor - low_factor) * h
    return valid.put(eps_low * factor, entropy.dtype), valid.put(eps_high * factor, entropy.dtype)


def _given_range(
    scope: str, lowest: float | Tensor | None, highest: float | Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    if lowest is None or highest is None:
        raise wrong("lowest" if lowest is None else "highest", None, "both of lowest and highest, or neither")
    if scope != "batch":
        raise wrong("lowest", lowest, f"None for scope {scope!r} (scope='batch' uses it)")
    return constant("lowest", lowest, like), constant("highest", highest, like)


class HapoStatistics(NamedTuple):
    """Of a batch, fp64, 0-d each: pivot, std of the log entropies around it, largest and smallest z."""

    pivot: Tensor
    std: Tensor
    largest: Tensor
    smallest: Tensor


def hapo_statistics(
    entropy: Tensor, *, quantile: float = 0.8, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> HapoStatistics:
    """What hapo_score normalises with, of all valid tokens: for a batch in parts, call this on the whole of it."""
    valid = valid_of(entropy, mask, cu_seqlens, "entropy")
    return _hapo_statistics(valid.take("entropy", entropy), quantile)


def _hapo_statistics(entropy: Tensor, quantile: float) -> HapoStatistics:
    _check_number("quantile", quantile, 0, 1)
    x = entropy.clamp(min=FLOOR).log()
    # The batch without a token has pivot 0, as in the authors' code.
    ordered = x.sort().values if x.numel() else x.new_zeros(1)
    pivot = ordered[round(quantile * (ordered.numel() - 1))]
    std = ((x - pivot).square().sum() / max(x.numel(), 1)).clamp(min=FLOOR).sqrt()
    z = torch.cat([(x - pivot) / std, x.new_zeros(1)])
    return HapoStatistics(pivot, std, z.amax().clamp(min=FLOOR), z.amin().clamp(max=-FLOOR))


def hapo_score(
    entropy: Tensor, *, quantile: float = 0.8, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    statistics: HapoStatistics | None = None, compat_sign_bug: bool = False,
) -> Tensor:  # fmt: skip
    """h in [-1, 1] of entropy's shape and dtype, the `score` of objective "hapo" (arXiv 2509.16591) [C].

        x = log max(H, 1e-8), z = (x - pivot) / std, std^2 = mean (x - pivot)^2, h = z / max z, or z / |min z| below 0

    pivot: the quantile of x over the valid tokens, that of the nearest rank (0.8 in every recipe of the authors).
    Floors of 1e-8 under std^2, max z and |min z|. statistics: of the whole of a batch that comes in parts, in place of
    quantile; the authors take those of each micro-batch. compat_sign_bug: |h|, what the authors' code computes (and ran
    with): it divides by min z, not by its magnitude. h is kept in [-1, 1].
    """
    valid = valid_of(entropy, mask, cu_seqlens, "entropy")
    x = valid.take("entropy", entropy)
    given = _hapo_statistics(x, quantile) if statistics is None else statistics
    pivot, std, largest, smallest = (
        constant(f"statistics.{name}", value, x) for name, value in zip(HapoStatistics._fields, given, strict=True)
    )
    z = (x.clamp(min=FLOOR).log() - pivot) / std
    h = (z / torch.where(z > 0, largest, -smallest)).clamp(-1, 1)
    return valid.put(h.abs() if compat_sign_bug else h, entropy.dtype)
