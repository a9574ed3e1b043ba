"""ULD and GOLD: a teacher of another tokenizer, by probabilities in the order of their size.

    spans, other_spans, number = aligned_spans(ends, other_ends)           # of one text, the same bytes
    p = span_probabilities(logits, ids, spans, number)
    r = span_probabilities(other_logits, other_ids, other_spans, number)
    loss = sorted_l1(p, r).mean()                                          # ULD
    loss = hybrid_uld(p, r, matched, other_matched).mean()                 # GOLD's hybrid, ids of the same string

Logits are [N, V] and [M, V'] of one text's tokens, each row that which predicts the id of its place (TRL's trainer,
where it merges "observed", hands in the row behind it). Composed torch with autograd's gradients; both [C, V] exist, as
a sort needs them.

Source: ULD, arXiv 2402.12030, and GOLD, as in TRL 1.16's GOLD trainer (trainers).
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch.checks import as_saved, check_integers, check_name, check_number, check_positive, check_tensor
from ..errors import described, wrong
from ..logprobs.from_logits import token_logprobs
from ..objectives.divergences import Divergence, divergence

MERGES = ("observed", "bayesian")


def aligned_spans(ends: Sequence[int], other_ends: Sequence[int]) -> tuple[Tensor, Tensor, int]:
    """(spans [n], spans of the other [m], how many): int64, the number of each token's span, -1 where there is none.

    A span ends where a token of each does; what is left of both at the end is one more, and what is left of one alone
    is in none.

    Args:
        ends: where each token of a text ends, in bytes, ascending.
        other_ends: likewise by the other tokenizer, of the same text.
    """
    n, m = len(ends), len(other_ends)
    bounds, i, j = [(0, 0)], 0, 0
    while i < n and j < m:
        own, other = ends[i], other_ends[j]
        i, j = i + (own <= other), j + (other <= own)
        if own == other:
            bounds.append((i, j))
    if bounds[-1][0] < n and bounds[-1][1] < m:
        bounds.append((n, m))
    spans, other_spans = torch.full((n,), -1), torch.full((m,), -1)
    for number, ((i, j), (next_i, next_j)) in enumerate(itertools.pairwise(bounds)):
        spans[i:next_i], other_spans[j:next_j] = number, number
    return spans, other_spans, len(bounds) - 1


def span_probabilities(
    logits: Tensor,
    ids: Tensor,
    spans: Tensor,
    number: int,
    *,
    merge: str = "observed",
    temperature: float = 1.0,
    floor: float = 1e-8,
) -> Tensor:
    """[C, V], fp32 or fp64: the distribution of one token of each span, times the probabilities of its other tokens.

        "observed"   of the first token, times those of the ids behind it
        "bayesian"   of the last token, times those of the ids before it, as the chain rule has it

    Rows sum to less than 1.

    Args:
        logits: floats [N, V], with their gradient.
        ids: integers [N], the tokens of the text.
        spans: integers [N] in [0, number), -1 for none; every span has a token.
        number: of spans, C.
        merge: "observed" or "bayesian".
        temperature: a number above 0.
        floor: above 0, of the probabilities that are multiplied, no gradient below.
    """
    check_name("merge", merge, MERGES)
    check_positive("temperature", temperature)
    check_number("floor", floor, above=0)
    check_spans("spans", logits, spans, number)
    spans = as_saved(spans)
    inside = spans >= 0
    at = torch.where(inside, spans, number)
    rows = torch.arange(len(spans), device=spans.device)
    base = torch.full((number + 1,), len(spans) if merge == "observed" else -1, device=spans.device)
    base = base.scatter_reduce(0, at, rows, "amin" if merge == "observed" else "amax")
    if ((base[:-1] < 0) | (base[:-1] >= len(spans))).any():
        raise wrong("spans", f"only {spans[inside].unique().tolist()}", f"every number from 0 to {number - 1}")
    logp = token_logprobs(logits, ids, temperature=temperature, row_mask=inside, outputs=["logp"]).logp
    scalar = inside & (rows != base[at])
    factor = torch.where(scalar, logp.clamp(min=math.log(floor)), 0)
    product = factor.new_zeros(number + 1).index_add(0, at, factor)[:-1]
    return (logits[base[:-1]].to(logp.dtype) / temperature).softmax(-1) * product.exp()[:, None]


def sorted_l1(p: Tensor, other: Tensor, *, most: int | None = None) -> Tensor:
    """[C]: sum |p_(i) - other_(i)| of the probabilities in descending order, of [C, V] and [C, V'].

    Args:
        p: floats [C, V].
        other: floats [C, V']; the narrower one has zeros behind (ULD).
        most: only the so many largest of each, and no more than either has (X-Token: 8192). None: all.
    """
    for name, x in (("p", p), ("other", other)):
        check_tensor(name, x)
        if x.dim() != 2 or not x.is_floating_point() or len(x) != len(p):
            raise wrong(name, described(x), f"floats [{len(p) if isinstance(p, Tensor) and p.dim() else 'C'}, V]")
    widths = p.shape[1], other.shape[1]
    count = max(widths) if most is None else min(*widths, most)
    largest = (x.topk(min(count, x.shape[1])).values for x in (p, other))
    first, second = (torch.nn.functional.pad(x, (0, count - x.shape[1])) for x in largest)
    return (first - second).abs().sum(-1)


def hybrid_uld(
    p: Tensor,
    other: Tensor,
    matched: Tensor,
    other_matched: Tensor,
    *,
    kind: str | Divergence = "jsd",
    weights: tuple[float, float] | None = None,
    floor: float = 1e-8,
) -> Tensor:
    """[C]: weights[0] D of the ids that both vocabularies have, plus weights[1] sorted_l1 of all others.

    Where either has no other ids, these count nothing.

    Args:
        p: floats [C, V], of span_probabilities.
        other: floats [C, V'], the teacher's.
        matched: int64 [n], ids of the strings that both vocabularies have.
        other_matched: int64 [n], the teacher's ids of the same strings.
        kind: a row of tokenrl.DIVERGENCES, its terms summed over the matched as they are, not renormalised.
        weights: None is n / V' and the rest to 1, which TRL has by default.
        floor: above 0, of the matched probabilities, no gradient below.
    """
    row = divergence(kind)
    check_number("floor", floor, above=0)
    for name, x in (("p", p), ("other", other)):
        check_tensor(name, x)
    check_integers("matched", matched)
    check_integers("other_matched", other_matched)
    if matched.shape != other_matched.shape or matched.dim() != 1:
        raise wrong("other_matched", f"shape {list(other_matched.shape)}", f"as many as matched, {list(matched.shape)}")
    matched, other_matched = as_saved(matched), as_saved(other_matched)
    share = len(matched) / other.shape[1]
    first, second = (share, 1 - share) if weights is None else weights
    logs = (x[:, at].clamp(min=floor).log() for x, at in ((p, matched), (other, other_matched)))
    alike = row.terms(*logs).sum(-1)
    own, others = without(p, matched), without(other, other_matched)
    return first * alike + (second * sorted_l1(own, others) if own.shape[1] and others.shape[1] else 0)


def without(x: Tensor, ids: Tensor) -> Tensor:
    """The columns of all other ids.

    Args:
        x: [C, V].
        ids: int64 [n], those that are left out.
    """
    ids = as_saved(ids)
    return x[:, torch.ones(x.shape[1], dtype=torch.bool, device=x.device).index_fill(0, ids, False)]


def check_spans(name: str, logits: Tensor, spans: Tensor, number: int) -> None:
    """That spans are numbers of spans, one per row of logits.

    Args:
        name: "spans" or "other_spans", for the error.
        logits: floats [N, V].
        spans: integers [N] in [-1, number).
        number: of spans.

    Raises:
        ValueError: where they are not.
    """
    rows = name.replace("spans", "logits")
    check_tensor(rows, logits)
    if logits.dim() != 2 or not logits.is_floating_point():
        raise wrong(rows, described(logits), "bf16, fp16, fp32 or fp64 [N, V]")
    check_integers(name, spans)
    if spans.shape != logits.shape[:1] or (spans.numel() and not -1 <= spans.min() <= spans.max() < number):
        given = f"{list(spans.shape)}" + (f" from {spans.min()} to {spans.max()}" if spans.numel() else "")
        raise wrong(name, given, f"[{len(logits)}] from -1 to {number - 1}")
