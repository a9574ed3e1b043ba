"""Divergences over K ids of a row instead of the whole vocabulary, and which K: a teacher's list, the student's, both.

    ids = topk_ids(other_logits, 64, row_mask=mask)                        # or linear_topk_ids, or a server's list
    logp = token_logprobs(logits, ids, row_mask=mask, outputs=["logp"]).logp   # or linear_token_logprobs: no [N, V]
    other_logp = token_logprobs(other_logits, ids, row_mask=mask, outputs=["logp"]).logp
    values = topk_token_divergence(logp, other_logp, "forward_kl", rest="tail", row_mask=mask)

topk_distillation_loss takes such lists, linear_topk_distillation_loss the ids and the teacher's.
"""

import torch
from torch import Tensor

from ..batch.checks import FLOATS, as_saved, check_integers, check_name, check_number, check_tensor, is_number
from ..errors import described, wrong
from ..objectives.divergences import Divergence, divergence
from ..ops.linear.gemm import linear
from .from_hidden import head_arguments
from .from_logits import DTYPES
from .row_chunks import check_count, ids_of_rows, rows_of

RESTS = ("tail", "renormalised", "truncated", "zero_outside")


def topk_token_divergence(
    logp_topk: Tensor,
    other_logp_topk: Tensor,
    kind: str | Divergence = "forward_kl",
    *,
    rest: str = "tail",
    topk_mask: Tensor | None = None,
    row_mask: Tensor | None = None,
    entropy: Tensor | None = None,
    limits: tuple[float, float] | None = None,
    tail_floor: float = 1e-7,
    logp_floor: float | None = None,
    outside_logp: float = -100.0,
) -> Tensor:
    """Divergence of p from r, known at K ids each, per token: [.., K] -> [..], with gradients to both where they
    require one, by autograd. Of all K = V ids it is token_divergence.

        "tail"          sum over the K and a bucket of all others, 1 - sum p and 1 - sum r
        "renormalised"  sum over the K of p / sum p and r / sum r
        "truncated"     sum over the K of p and r as they are; may be negative
        "zero_outside"  sum over the whole vocabulary, r renormalised on the K and e^outside_logp outside

    Args:
        logp_topk: fp32 or fp64 [.., K], K >= 1, the student's log-probs of distinct ids of the whole vocabulary;
            "renormalised" takes logits too.
        other_logp_topk: of that shape, the teacher's of the same ids.
        kind: a row of tokenrl.DIVERGENCES; "zero_outside" knows forward_kl, reverse_kl.
        rest: what becomes of the other ids, as above.
        topk_mask: bool [.., K], False where an entry is none (padding, an id that is there twice), which may hold
            anything.
        row_mask: bool [..]: rows where it is False give 0 and may hold anything.
        entropy: of p, [..], for the reverse_kl of "zero_outside" (token_logprobs gives it, with its gradient).
        limits: (lowest, highest) of the divergence, no gradient beyond (verl: (0, 10)).
        tail_floor: a bucket of less has this probability, and no gradient (TRL): sums of K probabilities near 1 are
            rounded, and D(r || p) is infinite where that makes a bucket of p 0.
        logp_floor: of the log-probs of both, no gradient below (verl: -10).
        outside_logp: log r of the ids outside, of "zero_outside".

    Source: TRL 1.16's IW-OPD and SDPO ("tail"), ms-swift, NeMo-RL ("renormalised", "zero_outside"), verl ("truncated").
    verl-recipe's hand-written backward of "truncated" is not its derivative (p_v where that has p_v sum r), ours is.
    """
    row = divergence(kind)
    check_name("rest", rest, RESTS)
    check_number("tail_floor", tail_floor, above=0)
    check_number("outside_logp", outside_logp)
    if logp_floor is not None:
        check_number("logp_floor", logp_floor)
    pair = isinstance(limits, (tuple, list)) and len(limits) == 2 and all(map(is_number, limits))
    if limits is not None and not (pair and limits[0] <= limits[1]):
        raise wrong("limits", limits, "two numbers, the lower first")
    _check_lists(logp_topk, other_logp_topk)
    topk_mask = _checked("topk_mask", topk_mask, logp_topk.shape)
    row_mask = _checked("row_mask", row_mask, logp_topk.shape[:-1])
    p, r = (_listed(x, logp_floor, topk_mask, row_mask) for x in (logp_topk, other_logp_topk))
    if rest == "zero_outside":
        values = _zero_outside(row, p, r - r.logsumexp(-1, keepdim=True), entropy, outside_logp, row_mask)
    else:
        if entropy is not None:
            raise wrong("entropy", "a tensor", f"None where rest is {rest!r}")
        if rest != "truncated":
            p, r = (_with_tail(x, tail_floor) if rest == "tail" else x - x.logsumexp(-1, keepdim=True) for x in (p, r))
        values = row.terms(p, r).sum(-1)
    if limits is not None:
        values = values.clamp(*limits)
    return values if row_mask is None else torch.where(row_mask, values, 0)


def _with_tail(logp: Tensor, floor: float) -> Tensor:
    """One bucket more: log(1 - sum p)."""
    total = logp.logsumexp(-1, keepdim=True).clamp(max=-floor)
    return torch.cat([logp, (-total.expm1()).log()], -1)


def _zero_outside(
    row: Divergence, p: Tensor, r: Tensor, entropy: Tensor | None, outside_logp: float, row_mask: Tensor | None
) -> Tensor:
    """r is about 0 outside: of D(r || p) nothing is left there, of D(p || r) sum p (log p - outside_logp)."""
    check_name("kind", row.name, ("forward_kl", "reverse_kl"))
    listed = row.terms(p, r).sum(-1)
    if entropy is not None:
        check_tensor("entropy", entropy)
    if row.name == "forward_kl":
        if entropy is not None:
            raise wrong("entropy", "a tensor", "None for forward_kl, of which nothing is left outside")
        return listed
    if entropy is None or entropy.shape != listed.shape:
        given = None if entropy is None else f"shape {list(entropy.shape)}"
        raise wrong("entropy", given, f"that of p, {list(listed.shape)}; reverse_kl of rest 'zero_outside' needs it")
    entropy = as_saved(entropy) if row_mask is None else torch.where(row_mask, as_saved(entropy), 0)
    own = row.terms(p, torch.zeros_like(p)).sum(-1)  # sum p log p
    return listed - entropy - own - outside_logp * (1 - p.exp().sum(-1))


def _check_lists(logp: Tensor, other: Tensor) -> None:
    for name, x in (("logp_topk", logp), ("other_logp_topk", other)):
        check_tensor(name, x)
        if x.dtype not in FLOATS or x.dim() < 2 or x.shape[-1] == 0:
            raise wrong(name, described(x), "float32 or float64 [.., K], K >= 1 (tokenrl.token_logprobs gives them)")
    if other.shape != logp.shape or other.device != logp.device:
        given = f"{list(other.shape)} on {other.device}"
        raise wrong("other_logp_topk", given, f"those of logp_topk, {list(logp.shape)} on {logp.device}")


def _checked(name: str, mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    if mask is None:
        return None
    check_tensor(name, mask)
    if mask.dtype != torch.bool or mask.shape != shape:
        raise wrong(name, f"{mask.dtype} {list(mask.shape)}", f"bool {list(shape)}")
    return as_saved(mask)


def _listed(logp: Tensor, floor: float | None, topk_mask: Tensor | None, row_mask: Tensor | None) -> Tensor:
    """-inf where there is no entry, -1 in rows that are left out."""
    logp = as_saved(logp) if floor is None else logp.clamp(min=floor)
    if topk_mask is not None:
        logp = torch.where(topk_mask, logp, -torch.inf)
    return logp if row_mask is None else torch.where(row_mask[..., None], logp, -1)


@torch.no_grad()
def topk_ids(logits: Tensor, k: int, *, row_mask: Tensor | None = None, memory_budget: int | None = None) -> Tensor:
    """The ids of the k largest logits of each row, int64 [.., k], largest first, of equal ones the lower id first
    (torch.topk says nothing of these, and bf16 logits are often equal).

    Args:
        logits: bf16, fp16, fp32 or fp64 [N, V] or [B, T, V]; NaN counts as -inf.
        k: from 1 to V.
        row_mask: bool [N] or [B, T]: rows that it leaves out have ids of -100, which token_logprobs ignores.
        memory_budget: bytes held beyond the result; None: 256 MiB on a CPU, 1 GiB on a GPU.
    """
    check_tensor("logits", logits)
    if logits.dtype not in DTYPES or logits.dim() not in (2, 3):
        raise wrong("logits", described(logits), "bf16, fp16, fp32 or fp64 [N, V] or [B, T, V]")
    check_count("k", k, logits.shape[-1])
    return ids_of_rows(lambda at: _largest(rows_of(logits, at), k), logits, k, row_mask, memory_budget)


@torch.no_grad()
def linear_topk_ids(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    row_mask: Tensor | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """topk_ids of the logits hidden @ weight^T + bias, of which only chunks of rows are held; softcap, scale and
    temperature would not change them.

    Args:
        hidden: [N, D] or [B, T, D].
        weight: [V, D].
        k: from 1 to V.
        bias: [V].
        row_mask: as for topk_ids.
        memory_budget: bytes of the chunks, as for topk_ids.
    """
    head = head_arguments(hidden, weight, bias, 1.0, None, 1.0, None, None, memory_budget, None)
    check_count("k", k, len(weight))

    def chosen(at: Tensor) -> Tensor:
        return _largest(linear(head.hidden[at], weight, bias), k)

    return ids_of_rows(chosen, head.like, k, row_mask, head.memory_budget)


def union_topk_ids(ids: Tensor, other_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(both lists in one, [.., K + K'], topk_mask: False where an id was there before). For the JSD of TRL, over the K
    of either model.

    Args:
        ids: integers [.., K], of one model.
        other_ids: integers [.., K'], of the other.
    """
    check_integers("ids", ids)
    check_integers("other_ids", other_ids)
    twice = (other_ids[..., :, None] == ids[..., None, :]).any(-1)
    return torch.cat([ids, other_ids], -1), torch.cat([torch.ones_like(ids, dtype=torch.bool), ~twice], -1)


def _largest(x: Tensor, k: int) -> Tensor:
    """[n, k] of [n, V]. torch.topk's list, but where the first that it left out is as large as the last in it."""
    values, ids = x.topk(min(k + 1, x.shape[-1]))
    if values[:, 0].isnan().any():  # it counts as the largest
        return _largest(torch.where(x.isnan(), -torch.inf, x), k)
    least, ids = values[:, k - 1 : k], ids[:, :k].clone()
    tied = (values[:, k:] == least).any(-1, keepdim=True)
    if tied.any():
        row, column = ((x == least) & tied).nonzero(as_tuple=True)
        first = torch.searchsorted(row, torch.arange(len(x), device=x.device))
        above = (values[:, :k] > least).sum(-1)
        place = (above - first)[row] + torch.arange(len(row), device=x.device)
        kept = place < k
        ids[row[kept], place[kept]] = column[kept]
    ids = ids.sort(-1).values  # which a stable sort keeps among equals
    return ids.gather(-1, x.gather(-1, ids).argsort(dim=-1, descending=True, stable=True))
