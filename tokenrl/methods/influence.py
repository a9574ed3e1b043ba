"""What a token's own gradient does to the likelihood of the correct rows of its group: the sums of THR and NTHR over
tiles of the vocabulary (see tokenrl/methods/thr.py)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch.checks import check_integers, check_name, check_tensor
from ..batch.groups import Groups, as_groups
from ..batch.valid_tokens import ValidTokens
from ..errors import wrong
from ..logprobs.logit_columns import HeadColumns, LogitColumns, budget_of, head_columns, logit_columns, tokens_of
from ..ops.linear.head import split

VOCABULARIES = ("group", "full")
PAIRS = ("all", "distinct", "others")
COLUMNS = 4096


def influence(
    hidden: Tensor, weight: Tensor | None, ids: Tensor, correct: Tensor, group_ids: Tensor, logits: Tensor | None,
    bias: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, vocabulary: str, pairs: str, normalize: bool,
    memory_budget: int | None,
) -> tuple[ValidTokens, Tensor]:  # fmt: skip
    """(the M valid tokens, sum over the correct rows' tokens u of <t, u>, fp64 [M])."""
    check_name("vocabulary", vocabulary, VOCABULARIES)
    check_name("pairs", pairs, PAIRS)
    if (weight is None) == (logits is None):
        raise wrong("logits", "None" if logits is None else "a tensor", "one of weight and logits")
    valid, budget = tokens_of(hidden, "hidden", mask, cu_seqlens), budget_of(memory_budget, hidden)
    check_integers("ids", ids)
    own = valid.layout.flat_tokens("ids", ids)[valid.cells].long()
    check_correct(correct, valid)
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
        with torch.autocast(own.device.type, enabled=False):
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


def check_correct(correct: Tensor, valid: ValidTokens) -> None:
    check_tensor("correct", correct)
    if correct.dtype != torch.bool:
        raise wrong("correct", f"dtype {correct.dtype}", "torch.bool, whether a row was rewarded")
    valid.layout.flat_sequences("correct", correct, torch.bool)
