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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_integers
from ..batch.groups import Groups, as_groups
from ..batch.valid_tokens import ValidTokens, per_token, valid_of
from ..errors import unknown, wrong
from ..logprobs.logit_columns import HeadColumns, LogitColumns, budget_of, head_columns, logit_columns, tokens_of
from ..ops.linear.head import split

VOCABULARIES = ("group", "full")
PAIRS = ("all", "distinct", "others")
COLUMNS = 4096


class NthrStatistics(NamedTuple):
    """Of each sequence's group, fp64 [S]: the score above which a token of a wrong row counts, and its factor."""

    tau: Tensor
    eta: Tensor


@torch.no_grad()
def thr(
    hidden: Tensor, weight: Tensor | None, ids: Tensor, correct: Tensor, group_ids: Tensor, *,
    logits: Tensor | None = None, bias: Tensor | None = None, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, vocabulary: str = "group", pairs: str = "all", memory_budget: int | None = None,
) -> Tensor:  # fmt: skip
    """Token hidden reward: [B, T], or [N] with cu_seqlens; fp32 (fp64 of fp64 hidden). 0 where a group has no correct
    row.

    hidden: [B, T, D] or [N, D], the state that predicts the token of its cell; weight: [V, D], the head's, with bias
    [V]; or weight None and the logits, [B, T, V] or [N, V]. bf16, fp16, fp32 or fp64; GEMMs and sums are in fp32.
    ids: integers [B, T]; correct: bool [S]; group_ids: integers [S].
    vocabulary: <g_t, g_u> runs over the tokens that the "group"'s rows hold (notes) or over the "full" vocabulary; pi
    is the softmax over all of it in both.
    pairs: "all"; "distinct", without t = u, a pair that dominates the others; "others", without any u in the row of t
    (for thr_threshold). The source does not say: "all" is our reading.
    memory_budget: bytes held beyond inputs and results, as for linear_token_logprobs.
    """
    valid, s = _influence(
        hidden, weight, ids, correct, group_ids, logits, bias, mask, cu_seqlens, vocabulary, pairs, True, memory_budget
    )
    signed = torch.where(correct[valid.row], s, -s)
    return valid.put(signed, torch.promote_types(hidden.dtype, torch.float32))


@torch.no_grad()
def nthr(
    hidden: Tensor, weight: Tensor | None, ids: Tensor, correct: Tensor, group_ids: Tensor, *,
    logits: Tensor | None = None, bias: Tensor | None = None, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, vocabulary: str = "group", pairs: str = "all", memory_budget: int | None = None,
) -> Tensor:  # fmt: skip
    """The score s_t of NTHR, neither signed by the row's reward nor divided by lengths; all else as in thr."""
    valid, s = _influence(
        hidden, weight, ids, correct, group_ids, logits, bias, mask, cu_seqlens, vocabulary, pairs, False, memory_budget
    )
    return valid.put(s, torch.promote_types(hidden.dtype, torch.float32))


def _influence(
    hidden: Tensor, weight: Tensor | None, ids: Tensor, correct: Tensor, group_ids: Tensor, logits: Tensor | None,
    bias: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, vocabulary: str, pairs: str, normalize: bool,
    memory_budget: int | None,
) -> tuple[ValidTokens, Tensor]:  # fmt: skip
    """(the M valid tokens, sum over the correct rows' tokens u of <t, u>, fp64 [M])."""
    if vocabulary not in VOCABULARIES:
        raise unknown("vocabulary", vocabulary, VOCABULARIES)
    if pairs not in PAIRS:
        raise unknown("pairs", pairs, PAIRS)
    if (weight is None) == (logits is None):
        raise wrong("logits", "None" if logits is None else "a tensor", "one of weight and logits")
    valid, budget = tokens_of(hidden, "hidden", mask, cu_seqlens), budget_of(memory_budget, hidden)
    check_integers("ids", ids)
    own = valid.layout.flat_tokens("ids", ids)[valid.cells].long()
    _check_correct(correct, valid)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    source: LogitColumns | HeadColumns
    if logits is None:
        assert weight is not None
        source, lse = head_columns(hidden, weight, valid, bias, dtype, budget, ids=ids)
    else:
        if logits.shape[:-1] != hidden.shape[:-1] or bias is not None:
            given = f"shape {list(logits.shape)}" + " beside a bias" * (bias is not None)
            raise wrong("logits", given, f"{[*hidden.shape[:-1], 'V']}, without bias")
        source, lse = logit_columns(logits, valid, ids)
    tokens = _Tokens(source, hidden.reshape(-1, hidden.shape[-1]), valid.cells, own, lse.to(dtype))
    found = torch.zeros(own.numel(), dtype=torch.float64, device=own.device)
    for group in _groups(valid, as_groups(group_ids, correct), correct, normalize):
        there = group.index[group.there]
        columns = own[there].unique() if vocabulary == "group" else None
        found[there] = _sums(tokens, group, columns, pairs, budget)[group.there]
    return valid, found


@dataclass(frozen=True)
class _Tokens:
    """The M valid tokens; hidden: [N, D]; lse: [M], in the dtype of all sums."""

    source: LogitColumns | HeadColumns
    hidden: Tensor
    cells: Tensor
    ids: Tensor
    lse: Tensor

    def states(self, index: Tensor) -> Tensor:
        """[*index, D]"""
        flat = self.hidden.index_select(0, self.cells[index.reshape(-1)])
        return flat.to(self.lse.dtype).view(*index.shape, -1)

    def errors(self, index: Tensor, columns: Tensor | None, at: slice) -> Tensor:
        """g, [*index, C], for some of the columns: ids in order, or None for the whole vocabulary."""
        wanted, place = (at, self.ids) if columns is None else (columns[at], torch.searchsorted(columns, self.ids))
        flat = index.reshape(-1)
        z = self.source.columns(self.source.states(self.cells[flat]), wanted)
        g = (z.to(self.lse.dtype) - self.lse[flat, None]).exp_().neg_()
        place = place[flat, None] - at.start
        inside = (place >= 0) & (place < g.shape[1])
        return g.scatter_add_(1, torch.where(inside, place, 0), inside.to(g.dtype)).view(*index.shape, -1)


@dataclass(frozen=True)
class _Group:
    """The R rows of a group, correct ones first. index: int64 [R, L], their tokens among the M; there: bool [R, L],
    False behind a row's end; share: [R+], what the tokens of a correct row count."""

    index: Tensor
    there: Tensor
    share: Tensor


def _groups(valid: ValidTokens, groups: Groups, correct: Tensor, normalize: bool) -> Iterator[_Group]:
    """The groups with a correct row, without rows that have no tokens."""
    lengths = torch.bincount(valid.row, minlength=valid.layout.num_sequences)
    starts = lengths.cumsum(0) - lengths
    rows = torch.argsort(groups.index * 2 + ~correct, stable=True)
    for own in rows.split(torch.bincount(groups.index, minlength=groups.number).tolist()):
        own = own[lengths[own] > 0]
        plus = lengths[own][correct[own]]
        if not plus.numel():
            continue
        place = torch.arange(int(lengths[own].max()), device=own.device)
        there = place < lengths[own, None]
        index = torch.where(there, starts[own, None] + place, 0)
        yield _Group(index, there, 1 / plus.double() if normalize else torch.ones_like(plus, dtype=torch.float64))


def _sums(tokens: _Tokens, group: _Group, columns: Tensor | None, pairs: str, budget: int) -> Tensor:
    """sum_u <t, u>, fp64 [R, L]."""
    plus, vocab = group.share.numel(), tokens.source.vocab if columns is None else columns.numel()
    width, length, per_row = _tile_size(tokens, group, vocab, pairs, budget)
    share = (group.share[:, None] * group.there[:plus]).to(tokens.lse.dtype)[..., None]
    found = torch.zeros(group.index.shape, dtype=torch.float64, device=group.index.device)
    for at in split(vocab, width):
        m = tokens.lse.new_zeros(plus if per_row else 1, at.stop - at.start, tokens.hidden.shape[1])
        for some in split(group.index.shape[1], length):
            index = group.index[:plus, some]
            g, h = tokens.errors(index, columns, at) * share[:, some], tokens.states(index)
            g, h = (g, h) if per_row else (g.flatten(0, 1)[None], h.flatten(0, 1)[None])
            m.baddbmm_(g.transpose(1, 2), h)
        for some in split(group.index.shape[1], length):
            index = group.index[:, some]
            g, h = tokens.errors(index, columns, at), tokens.states(index)
            found[:, some] += (g * (h @ m.sum(0).t())).sum(-1)
            if per_row:
                found[:plus, some] -= (g[:plus] * torch.bmm(h[:plus], m.transpose(1, 2))).sum(-1)
            elif pairs == "distinct":
                found[:plus, some] -= (
                    share[:, some, 0] * g[:plus].square().sum(-1) * h[:plus].square().sum(-1)
                ).double()
    return found


def _tile_size(tokens: _Tokens, group: _Group, vocab: int, pairs: str, budget: int) -> tuple[int, int, bool]:
    """(columns, positions of every row, whether there is a matrix for each correct row): half of the budget is for the
    matrices, half for the tokens."""
    per_row, size, d = pairs == "others", tokens.lse.element_size(), tokens.hidden.shape[1]
    rows, half = group.index.shape[0], budget // 2
    matrices = (group.share.numel() if per_row else 1) + 3
    fixed = tokens.source.bytes_per_token + 2 * d * size
    width = min(vocab, COLUMNS, half // (matrices * d * size), (half // rows - fixed) // (4 * size))
    length = half // (rows * (fixed + 4 * max(width, 1) * size))
    if width < 1 or length < 1:
        accepted = f"more: a column and one position of the {rows} rows of a group do not fit"
        raise wrong("memory_budget", f"{budget} bytes", accepted)
    return width, length, per_row


def thr_threshold(
    thr: Tensor, correct: Tensor, group_ids: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """tau, fp64 [S]: the mean of thr over all tokens of the correct rows of each group; 0 where these have none.

    thr: thr(..., pairs="others"), so that this is the influence of a correct row's token on the other correct rows. The
    source has "the mean influence of one correct response's tokens on the other correct responses"; that it is a sum
    over the others (as thr is), a mean over tokens and one number per group is our reading.
    """
    valid = valid_of(thr, mask, cu_seqlens, "thr")
    _check_correct(correct, valid)
    groups, x = as_groups(group_ids, correct), valid.take("thr", thr)
    total, count = (_of_rows(valid, torch.where(correct[valid.row], t, 0.0)) for t in (x, torch.ones_like(x)))
    return groups.sum(total) / groups.sum(count).clamp(min=1)


def thr_advantages(
    thr: Tensor, advantages: Tensor, *, p: float, tau: float | Tensor, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """1[|thr_t| > tau] (1 + sign(thr_t) p) A, of thr's shape and the advantages' dtype.

    advantages: [S], or of thr's shape. p: 0.1 favours exploitation, -0.1 exploration. tau: a number, 0-d, or one per
    sequence [S], as thr_threshold gives it.
    """
    if not abs(p) < torch.inf:
        raise wrong("p", p, "a finite number (0.1 or -0.1)")
    valid = valid_of(thr, mask, cu_seqlens, "thr")
    x, a = valid.take("thr", thr), _advantages(valid, advantages)
    kept = x.abs() > per_token("tau", tau, valid)
    return valid.put(torch.where(kept, (1 + x.sign() * p) * a, 0.0), advantages.dtype)


def nthr_statistics(
    nthr: Tensor, correct: Tensor, group_ids: Tensor, *, beta: float = 1.0, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> NthrStatistics:  # fmt: skip
    """tau = beta min_i mean_t nthr_t over the correct rows i of the group, inf if it has none; eta = 2 |1/2 - p|, p the
    fraction of its rows that are correct. fp64 [S] each; rows without tokens count in p only (our
    reading)."""
    valid = valid_of(nthr, mask, cu_seqlens, "nthr")
    _check_correct(correct, valid)
    groups, x = as_groups(group_ids, correct), valid.take("nthr", nthr)
    total, count = (_of_rows(valid, t) for t in (x, torch.ones_like(x)))
    mean = torch.where(correct & (count > 0), total / count.clamp(min=1), torch.inf)
    lowest = -groups.max(-mean)
    tau = torch.where(lowest < torch.inf, beta * lowest, torch.inf)
    rate = groups.sum(correct.double()) / groups.sum(torch.ones_like(total))
    return NthrStatistics(tau, 2 * (0.5 - rate).abs())


def nthr_advantages(
    nthr: Tensor, advantages: Tensor, correct: Tensor, *, tau: float | Tensor, eta: float | Tensor,
    mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """eta A at the tokens of rows that are not correct with nthr_t > tau, else A; of nthr's shape and the advantages'
    dtype.

    advantages: [S], or of nthr's shape. tau, eta: of nthr_statistics, or numbers.
    """
    valid = valid_of(nthr, mask, cu_seqlens, "nthr")
    _check_correct(correct, valid)
    x, a = valid.take("nthr", nthr), _advantages(valid, advantages)
    hit = ~correct[valid.row] & (x > per_token("tau", tau, valid))
    return valid.put(torch.where(hit, per_token("eta", eta, valid) * a, a), advantages.dtype)


def _of_rows(valid: ValidTokens, x: Tensor) -> Tensor:
    """[S]"""
    return x.new_zeros(valid.layout.num_sequences).index_add_(0, valid.row, x)


def _advantages(valid: ValidTokens, advantages: Tensor) -> Tensor:
    """fp64 [M]"""
    check_constant("advantages", advantages)
    a = valid.layout.flat_tokens_or_sequences("advantages", advantages, torch.float64)
    return a[valid.cells] if advantages.shape == valid.layout.shape else a[valid.row]


def _check_correct(correct: Tensor, valid: ValidTokens) -> None:
    if correct.dtype != torch.bool:
        raise wrong("correct", f"dtype {correct.dtype}", "torch.bool, whether a row was rewarded")
    valid.layout.flat_sequences("correct", correct, torch.bool)
