"""X-Token: a teacher of another tokenizer, by a sparse projection of the student's vocabulary onto its own.

    A = sparse_projection(ids, weights, teacher_vocab)                     # of each student id its teacher ids
    values, valid = p_kl(logits, other_logits, spans, other_spans, number, A)
    pair = matched_ids(ids, weights, teacher_vocab, match="relaxed")
    values, valid = h_kl(logits, other_logits, spans, other_spans, number, *pair)
    loss = values[valid].mean()                                            # per span, beside a cross entropy

Logits are [N, V] and [M, V'], all tokens of a batch, each row that which predicts its token; spans [N] and [M] number
the spans of the same text (tokenrl.uld.aligned_spans), -1 for none. Composed torch with autograd's gradients, to the
student alone; [N, K] and [C, V] exist. The trainer adds 0.1 of a cross entropy, or, its dynamic scaling, the cross
entropy to the mean scaled to its size, (ce / kd).detach() * kd + ce. Rows of the student without a span may hold
anything.

Source: arXiv 2605.21699 (NeMo-RL at commit 7ea279a: trainers).
"""

import torch
from torch import Tensor

from ..batch.checks import as_saved, check_integers, check_name, check_positive, check_tensor
from ..errors import wrong
from ..logprobs.topk import topk_ids
from ..objectives.divergences import divergence
from .uld import check_spans, sorted_l1, without

KINDS, MATCHES = ("forward_kl", "reverse_kl"), ("strict", "relaxed")
EPS, RELAXED = 1e-10, 0.6


def sparse_projection(ids: Tensor, weights: Tensor, vocab: int) -> Tensor:
    """A, sparse [V, V'], of the dtype of weights: A[v, ids[v, i]] = weights[v, i].

    Args:
        ids: int64 [V, k], of each student id its teacher ids, -1 for none.
        weights: floats [V, k].
        vocab: V', of the teacher.
    """
    _check_projection(ids, weights, vocab)
    given = ids >= 0
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    at = torch.stack([rows[given], ids[given]])
    return torch.sparse_coo_tensor(at, weights[given], (len(ids), vocab), check_invariants=False).coalesce()


def matched_ids(ids: Tensor, weights: Tensor, vocab: int, *, match: str = "relaxed") -> tuple[Tensor, Tensor]:
    """(student ids, teacher ids) that stand for each other, int64 [n] each, by the student's in ascending order.

    "strict"    a weight of 1 and a second id of -1; of several for one teacher id the lowest
    "relaxed"   the largest weight of a row, at least 0.6; of several that of the largest weight, then the lowest

    Args:
        ids: as for sparse_projection.
        weights: floats [V, k].
        vocab: V', of the teacher.
        match: "strict" or "relaxed".
    """
    check_name("match", match, MATCHES)
    _check_projection(ids, weights, vocab)
    best, place = weights.max(-1)
    strict = match == "strict"
    fits = (best == 1) & ((ids[:, 1] == -1) if ids.shape[1] > 1 else True) if strict else best >= RELAXED
    teacher = ids.gather(-1, place[:, None])[:, 0]
    own = (fits & (teacher >= 0)).nonzero()[:, 0]
    order = own if strict else own[best[own].argsort(dim=0, descending=True, stable=True)]
    first = torch.full((vocab,), len(ids), device=ids.device)
    rank = torch.arange(len(order), device=ids.device)
    first = first.scatter_reduce(0, teacher[order], rank, "amin")
    kept = order[first[teacher[order]] == rank].sort().values
    return kept, teacher[kept]


def p_kl(
    logits: Tensor,
    other_logits: Tensor,
    spans: Tensor,
    other_spans: Tensor,
    number: int,
    projection: Tensor,
    *,
    most: int = 8192,
    kind: str = "forward_kl",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(values [C], valid bool [C]): T^2 KL of each span, over the `most` teacher ids K whose largest logit of any row
    is largest, and which spans have tokens of both.

        q = mean over the span of (p @ A)_K, divided by its sum      log t = mean over the span of log softmax(z'_K / T)
        forward_kl  sum_K t (log t - log q)                          reverse_kl  sum_K q (log q - log t)

    The student averages probabilities and the teacher log-probs, so that t sums to less than 1, as in the trainer.

    Args:
        logits: the student's, floats [N, V], with their gradient.
        other_logits: the teacher's, floats [M, ..]; columns behind V' are padding. No gradient passes.
        spans: integers [N] in [0, number), -1 for none.
        other_spans: integers [M], likewise.
        number: of spans, C.
        projection: sparse [V, V'], of sparse_projection.
        most: teacher ids that are looked at.
        kind: "forward_kl" or "reverse_kl".
        temperature: T, above 0.
    """
    check_name("kind", kind, KINDS)
    check_positive("temperature", temperature)
    check_spans("spans", logits, spans, number)
    check_spans("other_spans", other_logits, other_spans, number)
    check_tensor("projection", projection)
    if projection.dim() != 2 or not projection.is_sparse or len(projection) != logits.shape[-1]:
        given = f"{projection.layout} {list(projection.shape)}"
        raise wrong("projection", given, f"a sparse tensor [{logits.shape[-1]}, V'] (sparse_projection makes it)")
    teacher = other_logits.detach()[:, : projection.shape[1]]
    columns = topk_ids(teacher.amax(0)[None], min(most, projection.shape[1]))[0].sort().values
    chosen = projection.index_select(1, columns)
    p = _rows(logits, spans, temperature).softmax(-1)
    with torch.autocast(p.device.type, enabled=False):
        projected = torch.sparse.mm(chosen.t().to(p.dtype), p.t()).t()
    q, count = _span_means(projected, spans, number)
    log_r = _rows(teacher[:, columns], other_spans, temperature).log_softmax(-1)
    log_t, other_count = _span_means(log_r, other_spans, number)
    log_q = (q / (q.sum(-1, keepdim=True) + EPS) + EPS).log()
    return _of_spans(temperature**2 * divergence(kind).terms(log_q, log_t).sum(-1), count, other_count)


def h_kl(
    logits: Tensor,
    other_logits: Tensor,
    spans: Tensor,
    other_spans: Tensor,
    number: int,
    matched: Tensor,
    other_matched: Tensor,
    *,
    most: int = 8192,
    kind: str = "forward_kl",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(values [C], valid bool [C]): T^2 (KL over the matched ids + sorted_l1 of all others, of the `most` largest), of
    the exponentials of each span's mean log-probs over the whole vocabularies, not renormalised.

    Args:
        logits: the student's, floats [N, V], with their gradient.
        other_logits: the teacher's, floats [M, V']; columns behind its vocabulary: cut them off. No gradient passes.
        spans: integers [N] in [0, number), -1 for none.
        other_spans: integers [M], likewise.
        number: of spans, C.
        matched: int64 [n], of matched_ids.
        other_matched: int64 [n], the teacher's.
        most: of the largest others of either model that are compared.
        kind: "forward_kl" or "reverse_kl".
        temperature: T, above 0.
    """
    check_name("kind", kind, KINDS)
    check_positive("temperature", temperature)
    check_spans("spans", logits, spans, number)
    check_spans("other_spans", other_logits, other_spans, number)
    check_integers("matched", matched)
    check_integers("other_matched", other_matched)
    spans, matched, other_matched = as_saved(spans), as_saved(matched), as_saved(other_matched)
    log_p, count = _span_means(_rows(logits, spans, temperature).log_softmax(-1), spans, number)
    log_r = _rows(other_logits.detach(), other_spans, temperature).log_softmax(-1)
    log_r, other_count = _span_means(log_r, other_spans, number)
    alike = divergence(kind).terms(log_p[:, matched], log_r[:, other_matched]).sum(-1)
    rest = sorted_l1(without(log_p, matched).exp(), without(log_r, other_matched).exp(), most=most)
    return _of_spans(temperature**2 * (alike + rest), count, other_count)


def _rows(logits: Tensor, spans: Tensor, temperature: float) -> Tensor:
    """Those of a span."""
    return logits[spans >= 0].to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def _span_means(x: Tensor, spans: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """([C, V], the tokens of each [C]) of the rows that have a span."""
    at = spans[spans >= 0]
    count = x.new_zeros(number).index_add(0, at, torch.ones_like(at, dtype=x.dtype))
    return x.new_zeros(number, x.shape[1]).index_add(0, at, x) / count.clamp(min=1)[:, None], count


def _of_spans(values: Tensor, count: Tensor, other_count: Tensor) -> tuple[Tensor, Tensor]:
    valid = (count > 0) & (other_count > 0)
    return torch.where(valid, values, 0), valid


def _check_projection(ids: Tensor, weights: Tensor, vocab: int) -> None:
    check_integers("ids", ids)
    if ids.dim() != 2 or not -1 <= ids.min() <= ids.max() < vocab:
        raise wrong("ids", f"{list(ids.shape)} from {ids.min()} to {ids.max()}", f"[V, k] from -1 to {vocab - 1}")
    check_tensor("weights", weights)
    if weights.shape != ids.shape or not weights.is_floating_point():
        raise wrong("weights", f"{weights.dtype} {list(weights.shape)}", f"floats {list(ids.shape)}")
