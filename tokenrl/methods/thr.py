"""THR and NTHR: what a token does to the likelihood of the correct rollouts of its prompt, without gradient.

    g_t = e_{y_t} - pi_t, h_t the hidden state before the head, <t, u> = <g_t, g_u> <h_t, h_u>
    thr_t  = (2 correct_j - 1) sum_{i correct} 1 / |y_i| sum_{u in i} <t, u>       for the tokens t of row j
    nthr_t = sum_{i correct} sum_{u in i} <t, u>

    A = thr_advantages(x, A, p=0.1, tau=thr_threshold(thr(..., pairs="others"), correct, group_ids))
    A = nthr_advantages(s, A, correct, **nthr_statistics(s, correct, group_ids)._asdict())  # its predecessor

with x = thr(...) and s = nthr(...). Sums over u come first, as the matrices sum_u g_u h_u^T of some columns of the
vocabulary: no matrix of token pairs, and no [tokens, V] beyond a memory budget. All is of the policy that sampled and
taken as constant. Groups must be whole in a call, but for the advantages. Tensors are padded [B, T] with a bool mask,
or packed [N] with cu_seqlens [S + 1]; results are 0 in masked cells, which may hold anything.

Source: arXiv 2510.03669 and its predecessor (notes).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.checks import FINITE, check_constant, check_number
from ..batch.groups import as_groups
from ..batch.valid_tokens import ValidTokens, per_token, valid_of
from .influence import check_correct, influence


class NthrStatistics(NamedTuple):
    """Of each sequence's group, fp64 [S]: the score above which a token of a wrong row counts, and its factor."""

    tau: Tensor
    eta: Tensor


@torch.no_grad()
def thr(
    hidden: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    correct: Tensor,
    group_ids: Tensor,
    *,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    vocabulary: str = "group",
    pairs: str = "all",
    memory_budget: int | None = None,
) -> Tensor:
    """Token hidden reward: [B, T], or [N] with cu_seqlens; fp32 (fp64 of fp64 hidden). 0 where a group has no correct
    row.

    Args:
        hidden: bf16, fp16, fp32 or fp64 [B, T, D] or [N, D], the state that predicts the token of its cell; GEMMs and
            sums are in fp32. No gradient passes.
        weight: [V, D], the head's; or None and the logits.
        ids: integers [B, T] or [N].
        correct: bool [S].
        group_ids: integers [S]; groups must be whole in a call.
        logits: [B, T, V] or [N, V], without a weight.
        bias: [V], beside weight.
        mask: bool [B, T] or [N].
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        vocabulary: <g_t, g_u> runs over the tokens that the "group"'s rows hold (notes) or over the "full" vocabulary;
            pi is the softmax over all of it in both.
        pairs: "all"; "distinct", without t = u, a pair that dominates the others; "others", without any u in the row of
            t (for thr_threshold). The source does not say: "all" is our reading.
        memory_budget: bytes held beyond inputs and results, as for linear_token_logprobs.
    """
    valid, s = influence(
        hidden, weight, ids, correct, group_ids, logits, bias, mask, cu_seqlens, vocabulary, pairs, True, memory_budget
    )
    signed = torch.where(correct[valid.row], s, -s)
    return valid.put(signed, torch.promote_types(hidden.dtype, torch.float32))


@torch.no_grad()
def nthr(
    hidden: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    correct: Tensor,
    group_ids: Tensor,
    *,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    vocabulary: str = "group",
    pairs: str = "all",
    memory_budget: int | None = None,
) -> Tensor:
    """The score s_t of NTHR, neither signed by the row's reward nor divided by lengths; all else as in thr.

    Args:
        hidden: [B, T, D] or [N, D].
        weight: [V, D], or None and the logits.
        ids: integers [B, T] or [N].
        correct: bool [S].
        group_ids: integers [S].
        logits: [B, T, V] or [N, V], without a weight.
        bias: [V], beside weight.
        mask: bool [B, T] or [N].
        cu_seqlens: integers [S + 1].
        vocabulary: "group" or "full".
        pairs: "all", "distinct" or "others".
        memory_budget: bytes held beyond inputs and results.
    """
    valid, s = influence(
        hidden, weight, ids, correct, group_ids, logits, bias, mask, cu_seqlens, vocabulary, pairs, False, memory_budget
    )
    return valid.put(s, torch.promote_types(hidden.dtype, torch.float32))


def thr_threshold(
    thr: Tensor, correct: Tensor, group_ids: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """tau, fp64 [S]: the mean of thr over all tokens of the correct rows of each group; 0 where these have none.

    The source has "the mean influence of one correct response's tokens on the other correct responses"; that it is a
    sum over the others (as thr is), a mean over tokens and one number per group is our reading.

    Args:
        thr: fp32 or fp64 [B, T], or [N] with cu_seqlens: thr(..., pairs="others"), so that this is the influence of a
            correct row's token on the other correct rows.
        correct: bool [S].
        group_ids: integers [S]; groups must be whole in a call.
        mask: bool of the shape of thr.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    valid = valid_of(thr, mask, cu_seqlens, "thr")
    check_correct(correct, valid)
    groups, x = as_groups(group_ids, correct), valid.take("thr", thr)
    total, count = (_of_rows(valid, torch.where(correct[valid.row], t, 0.0)) for t in (x, torch.ones_like(x)))
    return groups.sum(total) / groups.sum(count).clamp(min=1)


def thr_advantages(
    thr: Tensor,
    advantages: Tensor,
    *,
    p: float,
    tau: float | Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages_per: str | None = None,
) -> Tensor:
    """1[|thr_t| > tau] (1 + sign(thr_t) p) A, of thr's shape and the advantages' dtype.

    Args:
        thr: fp32 or fp64 [B, T], or [N] with cu_seqlens, of thr.
        advantages: fp32 or fp64 [S], or of thr's shape; a constant.
        p: finite: 0.1 favours exploitation, -0.1 exploration.
        tau: a number, 0-d, or one per sequence [S], as thr_threshold gives it.
        mask: bool of the shape of thr.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages_per: as for policy_loss.
    """
    check_number("p", p, -FINITE, FINITE, accepted="a finite number (0.1 or -0.1)")
    valid = valid_of(thr, mask, cu_seqlens, "thr")
    x, a = valid.take("thr", thr), _advantages(valid, advantages, advantages_per)
    kept = x.abs() > per_token("tau", tau, valid)
    return valid.put(torch.where(kept, (1 + x.sign() * p) * a, 0.0), advantages.dtype)


def nthr_statistics(
    nthr: Tensor,
    correct: Tensor,
    group_ids: Tensor,
    *,
    beta: float = 1.0,
    eta: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> NthrStatistics:
    """tau = beta min_i mean_t nthr_t over the correct rows i of the group, inf if it has none; eta = 2 |1/2 - p|, p the
    fraction of its rows that are correct. fp64 [S] each; rows without tokens count in p only (our reading).

    Args:
        nthr: fp32 or fp64 [B, T], or [N] with cu_seqlens, of nthr.
        correct: bool [S].
        group_ids: integers [S]; groups must be whole in a call.
        beta: a number.
        eta: a number in place of 2 |1/2 - p|: 0 in section 5.3 of the paper, whose beta is 1.
        mask: bool of the shape of nthr.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    check_number("beta", beta)
    if eta is not None:
        check_number("eta", eta, accepted="a number, None for 2 |1/2 - p|")
    valid = valid_of(nthr, mask, cu_seqlens, "nthr")
    check_correct(correct, valid)
    groups, x = as_groups(group_ids, correct), valid.take("nthr", nthr)
    total, count = (_of_rows(valid, t) for t in (x, torch.ones_like(x)))
    mean = torch.where(correct & (count > 0), total / count.clamp(min=1), torch.inf)
    lowest = -groups.max(-mean)
    tau = torch.where(lowest < torch.inf, beta * lowest, torch.inf)
    rate = groups.sum(correct.double()) / groups.sum(torch.ones_like(total))
    return NthrStatistics(tau, 2 * (0.5 - rate).abs() if eta is None else torch.full_like(rate, eta))


def nthr_advantages(
    nthr: Tensor,
    advantages: Tensor,
    correct: Tensor,
    *,
    tau: float | Tensor,
    eta: float | Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages_per: str | None = None,
) -> Tensor:
    """eta A at the tokens of rows that are not correct with nthr_t > tau, else A; of nthr's shape and the advantages'
    dtype.

    Args:
        nthr: fp32 or fp64 [B, T], or [N] with cu_seqlens, of nthr.
        advantages: fp32 or fp64 [S], or of nthr's shape; a constant.
        correct: bool [S].
        tau: of nthr_statistics, or a number.
        eta: likewise.
        mask: bool of the shape of nthr.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages_per: as for policy_loss.
    """
    valid = valid_of(nthr, mask, cu_seqlens, "nthr")
    check_correct(correct, valid)
    x, a = valid.take("nthr", nthr), _advantages(valid, advantages, advantages_per)
    hit = ~correct[valid.row] & (x > per_token("tau", tau, valid))
    return valid.put(torch.where(hit, per_token("eta", eta, valid) * a, a), advantages.dtype)


def _of_rows(valid: ValidTokens, x: Tensor) -> Tensor:
    """[S]"""
    return x.new_zeros(valid.layout.num_sequences).index_add_(0, valid.row, x)


def _advantages(valid: ValidTokens, advantages: Tensor, per: str | None) -> Tensor:
    """fp64 [M]"""
    check_constant("advantages", advantages)
    return valid.layout.of_tokens("advantages", advantages, torch.float64, per)[valid.cells]
