"""Which tokens of given texts, and which texts, a model learns from: ssToken, Rho-1, RSR, critical tokens of cDPO.

    kept = sstoken_mask(logp.detach(), history_logp, attention, mask=mask)       # or rho1_mask, or top_mask of a score
    loss, _ = tokenrl.linear_sft_loss(hidden, weight, ids, mask=kept)            # tokens left out enter no GEMM

Log-probs are fp32 or fp64, padded [B, T] with a bool mask, or packed [N] with cu_seqlens [S + 1]. Masks have their
shape and are False in masked cells, which may hold anything. Everything here is without gradient, and nothing waits
for a GPU.
"""

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_floats, check_integers, check_name, check_number, check_tensor
from ..batch.layout import Layout, layout_of
from ..batch.ranks import places, share_counts
from ..batch.spans import Spans, spans_of
from ..errors import wrong
from ..logprobs.combined_head import combined_head
from ..logprobs.combined_logits import combined_rows
from ..logprobs.from_hidden import linear_token_logprobs
from ..logprobs.from_logits import IGNORED, check_ids, token_logprobs

SCOPES = ("sequence", "batch")
PER = ("sequence", "token", "data")


def top_mask(
    score: Tensor, *, share: float, scope: str = "sequence", rounding: str = "ceil", mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """bool of score's shape: the `share` of the valid tokens with the highest scores; of equal scores the first.

    Args:
        score: fp32 or fp64 [B, T], or [N] with cu_seqlens, a constant.
        share: of the tokens, above 0, at most 1.
        scope: of each "sequence", or of all tokens of the "batch".
        rounding: of share times the count: "ceil", or "floor", and then at least one.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    check_name("scope", scope, SCOPES)
    layout = layout_of(score, mask=mask, cu_seqlens=cu_seqlens, name="score")
    return _top(_taken("score", score, layout), share, scope, rounding, layout)


def sstoken_mask(
    logp: Tensor, history_logp: Tensor | None, attention: Tensor | None = None, *, gamma: float = 0.5,
    rho: float = 0.6, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """bool of logp's shape: of each sequence the ceil(rho n) tokens of the highest

        gamma (e_t - min e) / (max e - min e + 1e-8) + (1 - gamma) attention_t,   e_t = logp_t - history_logp_t

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, detached.
        history_logp: of that shape, of an earlier model, the frozen one or an average of the past, None for gamma 0.
        attention: of that shape, of each token to the prompt, None for gamma 1: attention weights of the last layer,
            the mean over heads, summed over the prompt's positions.
        gamma: in [0, 1]: 0 is attention alone, the authors' warm-up (until they meet the 10000th sample).
        rho: above 0, at most 1; 0.8 for models of 14B.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.

    Source: ssToken, arXiv 2510.18250 (authors' code; where rho n is an integer but for its rounding error, theirs keeps
    one token more).
    """
    check_number("gamma", gamma, 0, 1)
    check_number("rho", rho, most=1, above=0, accepted="the fraction of tokens to keep, above 0 and at most 1")
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    score = torch.zeros(layout.num_tokens, dtype=torch.float64, device=logp.device)
    if gamma > 0:
        if history_logp is None:
            raise wrong("history_logp", None, f"one log-prob per token, {list(layout.shape)}; gamma is {gamma}")
        gained = _taken("logp", logp, layout) - _taken("history_logp", history_logp, layout)
        score = gamma * _stretched(gained, layout)
    if gamma < 1:
        if attention is None:
            raise wrong("attention", None, f"one number per token, {list(layout.shape)}; gamma is {gamma}")
        score = score + (1 - gamma) * _taken("attention", attention, layout)
    return _top(score, rho, "sequence", "ceil", layout)


def rho1_mask(
    logp: Tensor, ref_logp: Tensor, *, share: float = 0.6, scope: str = "batch", rounding: str = "ceil",
    mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """bool of logp's shape: the `share` of the tokens of the highest excess loss, ref_logp_t - logp_t: those that a
    good reference predicts and the model does not yet (ssToken's sign is the other one).

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, detached.
        ref_logp: of that shape, of the reference.
        share: above 0, at most 1.
        scope: as for top_mask.
        rounding: as for top_mask.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.

    Source: Rho-1, arXiv 2404.07965 (notes; that the batch is the scope, and its 60 to 70 %, our reading).
    """
    check_name("scope", scope, SCOPES)
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    excess = _taken("ref_logp", ref_logp, layout) - _taken("logp", logp, layout)
    return _top(excess, share, scope, rounding, layout)


def rank_surprisal_ratio(
    logp: Tensor, rank: Tensor, *, r_max: int = 100, per: str = "sequence", mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """min(rank, r_max) over -logp, how well given texts suit a student: the lower the better. In logp's dtype.

        "sequence"   [B] or [S]: sum_t rank_t / sum_t -logp_t
        "token"      of logp's shape: rank_t / -logp_t, 0 in masked cells
        "data"       0-d: the mean over sequences of their mean rank by that of their mean -logp

    Divisors are at least 1e-12; a sequence without tokens is NaN and no part of "data". The variant of surprising
    tokens alone is that of mask=top_mask(-logp, share=0.3, mask=mask).

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, detached; with rank of one sweep, token_logprobs(logits, ids,
            outputs=["logp", "rank"]).
        rank: integers of that shape.
        r_max: at least 1.
        per: "sequence", "token" or "data".
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.

    Source: arXiv 2601.14249 (authors' code).
    """
    check_name("per", per, PER)
    check_number("r_max", r_max, 1)
    check_integers("rank", rank)
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    surprisal = -_taken("logp", logp, layout)
    place = torch.where(layout.valid(), layout.flat_tokens("rank", rank), 0).clamp(max=r_max).double()
    if per == "token":
        return (place / surprisal.clamp(min=1e-12)).to(logp.dtype).view(layout.shape)
    spans = spans_of("sequence", layout)
    if per == "sequence":
        ratio = spans.sum(place) / spans.sum(surprisal).clamp(min=1e-12)
        return torch.where(spans.counts() > 0, ratio, torch.nan).to(logp.dtype)
    return (spans.mean(place).sum() / spans.mean(surprisal).sum().clamp(min=1e-12)).to(logp.dtype)


@torch.no_grad()
def critical_scores(
    pos_logits: Tensor, neg_logits: Tensor, ids: Tensor, *, lam: float = 1.0, row_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """softmax((1 + lam) z_pos - lam z_neg)[id], [N] or [B, T]: small where a token leads to wrong answers, as a model
    fitted to these likes it and one fitted to right answers does not. For preference_weights.cdpo_weights.

    An id that is out of the vocabulary of z_pos, -inf, is out; z_neg is finite elsewhere.

    Args:
        pos_logits: of the model fitted to right answers, [N, V] or [B, T, V]; combined in fp32 (fp64 of fp64), a
            few rows at a time.
        neg_logits: of the one fitted to wrong answers, of that shape.
        ids: integers, one per row; rows of -100 give 0.
        lam: at least 0.
        row_mask: bool [N] or [B, T]: rows where it is False give 0.
        backend: as for policy_loss.

    Source: cDPO, arXiv 2411.19943 (authors' code, lam 1).
    """
    _check_lam(lam)
    for name, x in (("pos_logits", pos_logits), ("neg_logits", neg_logits)):
        check_tensor(name, x)
    if neg_logits.shape != pos_logits.shape or neg_logits.device != pos_logits.device:
        given = f"{list(neg_logits.shape)} on {neg_logits.device}"
        raise wrong("neg_logits", given, f"those of pos_logits, {list(pos_logits.shape)} on {pos_logits.device}")
    check_ids(pos_logits, ids, ["logp"])
    of_rows = ids.reshape(pos_logits.shape[:-1].numel(), *ids.shape[pos_logits.dim() - 1 :])
    wide = torch.promote_types(pos_logits.dtype, torch.float32)
    b, found = torch.full((len(of_rows),), -lam, dtype=wide, device=ids.device), torch.zeros_like(of_rows, dtype=wide)
    for at, z in combined_rows(pos_logits, neg_logits, 1 - b, b, row_mask):
        found[at] = token_logprobs(z, of_rows[at], outputs=["logp"], backend=backend).logp.exp()
    return _of_rows_read(found.view(ids.shape), ids, row_mask)


@torch.no_grad()
def linear_critical_scores(
    pos_hidden: Tensor, pos_weight: Tensor, neg_hidden: Tensor, neg_weight: Tensor, ids: Tensor, *, lam: float = 1.0,
    row_mask: Tensor | None = None, memory_budget: int | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """critical_scores of the logits pos_hidden @ pos_weight^T and neg_hidden @ neg_weight^T, by one head of both
    (tokenrl.combined_head): no logits. Where both models share a head, as two adapters do, hand in the same tensor
    twice: then it is one GEMM of the head's own width.

    Args:
        pos_hidden: [N, D] or [B, T, D].
        pos_weight: [V, D].
        neg_hidden: [N, D'] or [B, T, D'].
        neg_weight: [V, D'].
        ids: integers, one per row; rows of -100 give 0.
        lam: at least 0.
        row_mask: bool [N] or [B, T]: rows where it is False give 0 and enter no GEMM.
        memory_budget: as for linear_token_logprobs.
        backend: as for policy_loss.
    """
    _check_lam(lam)
    hidden, weight = combined_head(pos_hidden, pos_weight, neg_hidden, neg_weight, 1 + lam, -lam)
    how = {"row_mask": row_mask, "memory_budget": memory_budget, "backend": backend}
    found = linear_token_logprobs(hidden, weight, ids, outputs=["logp"], **how).logp.exp()  # type: ignore[arg-type]
    return _of_rows_read(found, ids, row_mask)


def _of_rows_read(found: Tensor, ids: Tensor, row_mask: Tensor | None) -> Tensor:
    read = ids != IGNORED if row_mask is None else row_mask & (ids != IGNORED)
    return torch.where(read, found, 0)


def _check_lam(lam: float) -> None:
    check_number("lam", lam, 0)


def _taken(name: str, x: Tensor, layout: Layout) -> Tensor:
    """fp64 [N], 0 in masked cells."""
    check_floats(name, x)
    check_constant(name, x)
    return torch.where(layout.valid(), layout.flat_tokens(name, x), 0).double()


def _top(score: Tensor, share: float, scope: str, rounding: str, layout: Layout) -> Tensor:
    spans = spans_of("sequence", layout)
    if scope == "batch":
        spans = Spans(torch.zeros_like(spans.index), spans.valid, 1)
    kept = places(score, spans) < share_counts(share, spans.counts(), rounding)[spans.index]
    return (kept & spans.valid).view(layout.shape)


def _stretched(x: Tensor, layout: Layout) -> Tensor:
    """From the lowest of each sequence, 0, to its highest, 1."""
    low, high = map(layout.spread, spans_of("sequence", layout).edges(x))
    return torch.where(layout.valid(), (x - low) / (high - low + 1e-8), 0)
