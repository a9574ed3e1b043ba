"""SSPO: the (sub)sentences of a batch, and bounds of the ratio from their entropies, without gradient.

Tensors are padded [B, T] with a bool mask, or packed [N] with cu_seqlens [S + 1]; results have that shape, and are 0 in
masked cells, which may hold anything. All is computed in fp64. What looks beyond a row takes the statistics of the
whole batch, so that its parts get the same numbers.

Source: arXiv 2511.04256 (our reading of where a span ends and how wide its window is).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..batch.checks import as_scalar, check_integers, check_name, check_number
from ..batch.groups import Groups
from ..batch.layout import layout_of
from ..batch.spans import spans_of
from ..batch.valid_tokens import ValidTokens, valid_of
from ..errors import wrong

SCOPES = ("sequence", "batch")
EQUAL = 1e-8


def segment_ids(
    ids: Tensor, delimiters: Iterable[int] | Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """int64 of ids' shape: the (sub)sentence of each token, counted from 0 in its sequence.

    A token whose id is among delimiters ends its span and belongs to it, so two in a row make a span of one; what
    follows the last one is a span as well. A masked cell ends no span, whatever it holds. Which ids end a sentence, or
    a clause, is the tokenizer's matter: one that holds the mark with other text must be listed as well. All
    this is our reading.

    Args:
        ids: integers [B, T], or [N] with cu_seqlens.
        delimiters: several ids, or integers of any shape.
        mask: bool of the shape of ids.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    layout = layout_of(ids, mask=mask, cu_seqlens=cu_seqlens, name="ids")
    check_integers("ids", ids)
    if isinstance(delimiters, int):
        raise wrong("delimiters", delimiters, f"several ids: [{delimiters}]")
    marks = torch.as_tensor(delimiters if isinstance(delimiters, Tensor) else list(delimiters), device=ids.device)
    if marks.numel():
        check_integers("delimiters", marks)
    valid, rows = layout.valid(), spans_of("sequence", layout).index
    ends = valid & torch.isin(layout.flat_tokens("ids", ids, torch.int64), marks.to(torch.int64))
    before = torch.cat([ends.new_zeros(1), ends]).cumsum(0)
    number = before[:-1] - before[layout.cu_seqlens[:-1]][rows]
    return torch.where(valid, number, 0).view(layout.shape)


def entropy_range(
    entropy: Tensor, segment_ids: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(lowest, highest) mean entropy of a span of the batch, fp64, 0-d; inf, -inf if there is none. For entropy_bounds
    on a batch in parts: the minimum and the maximum of what the parts give.

    Args:
        entropy: fp32 or fp64 [B, T], or [N] with cu_seqlens, in nats, a constant.
        segment_ids: integers of that shape.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
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
    spans = spans_of("segment", valid.layout, valid.layout.flat_tokens("segment_ids", segment_ids))
    return valid, Groups(spans.index[valid.cells], spans.number).mean(x, torch.ones_like(x))


def entropy_bounds(
    entropy: Tensor,
    segment_ids: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    low_factor: float = 0.5,
    high_factor: float = 1.5,
    scope: str = "sequence",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lowest: float | Tensor | None = None,
    highest: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(eps_low, eps_high) of entropy's shape and dtype: a wider window where a span is uncertain.

        h_k = (H_k - min_j H_j) / (max_j H_j - min_j H_j),    f_k = low_factor + (high_factor - low_factor) h_k
        eps_low_k = eps_low f_k,    eps_high_k = eps_high f_k

    H_k: mean entropy of the span k, a run of equal segment_ids among the valid tokens of a sequence. Where minimum and
    maximum differ by 1e-8 or less (a sequence of one span) h is 1/2; h is kept in [0, 1]. The source fixes that the
    window of a span grows with its entropy; the formula and its numbers are our reading.

    Args:
        entropy: fp32 or fp64 [B, T], or [N] with cu_seqlens, in nats, a constant.
        segment_ids: integers of that shape.
        eps_low: at least 0, before the factor.
        eps_high: at least 0, before the factor.
        low_factor: at least 0, of the span with the lowest entropy.
        high_factor: at least low_factor, of that with the highest.
        scope: minimum and maximum are those of the "sequence" or of the "batch".
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        lowest: a number or 0-d in place of the minimum, for "batch": entropy_range of the whole of a batch that comes
            in parts.
        highest: likewise of the maximum; both or neither.
    """
    check_name("scope", scope, SCOPES)
    for name, x in (("eps_low", eps_low), ("eps_high", eps_high), ("low_factor", low_factor)):
        check_number(name, x, 0)
    check_number("high_factor", high_factor, low_factor)
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
    return as_scalar("lowest", lowest, like), as_scalar("highest", highest, like)
