"""Ids chosen in each row of logits, a few rows at a time, so that little is held beside them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..batch.checks import check_bytes
from ..errors import wrong
from .from_hidden import DEFAULT_BUDGET
from .from_logits import IGNORED, check_row_mask

BYTES = 16  # of a logit, while its row is looked at


def row_chunks(
    like: Tensor, row_mask: Tensor | None, memory_budget: int | None, bytes_per_logit: int = BYTES
) -> Iterator[Tensor]:
    """Flat indices of the rows of logits shaped as `like` that row_mask keeps, as many at a time as the budget has
    room for, at least one."""
    if row_mask is None:
        row_mask = torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device)
    check_row_mask(row_mask, like)
    if memory_budget is None:
        memory_budget = DEFAULT_BUDGET.get(like.device.type, DEFAULT_BUDGET["cpu"])
    check_bytes("memory_budget", memory_budget)
    kept = row_mask.reshape(-1).nonzero()[:, 0]
    if len(kept):
        yield from kept.split(max(1, memory_budget // (bytes_per_logit * like.shape[-1])))


def rows_of(logits: Tensor, at: Tensor) -> Tensor:
    """[n, V]: a view where they are neighbours, else a copy of these."""
    if logits.is_contiguous() and at[-1] - at[0] == len(at) - 1:
        return logits.view(-1, logits.shape[-1])[at[0] : at[-1] + 1]
    return logits[torch.unravel_index(at, logits.shape[:-1])]


def ids_of_rows(
    chosen: Callable[[Tensor], Tensor], like: Tensor, k: int, row_mask: Tensor | None, memory_budget: int | None
) -> Tensor:
    """int64 [.., k] of what is chosen in the rows of some flat indices, -100 in rows left out."""
    rows = like.shape[:-1]
    out = torch.full((rows.numel(), k), IGNORED, dtype=torch.int64, device=like.device)
    for at in row_chunks(like, row_mask, memory_budget):
        out[at] = chosen(at)
    return out.view(*rows, k)


def check_count(name: str, count: int, vocab: int) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= vocab:
        raise wrong(name, count, f"an integer from 1 to {vocab}, the vocabulary")
