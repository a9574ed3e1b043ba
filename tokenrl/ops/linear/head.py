"""The head as the ops see it: its logits, and the tiles of them that fit into a budget."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import wrong
from ..arguments import OpArguments
from ..kernel_ops import Transform
from .gemm import sum_dtype

# Columns of a tile: on a CPU it stays in the cache, on a GPU it is large enough for the GEMM.
MOST_COLUMNS = {"cpu": 4096, "cuda": 65536}
CAST_COLUMNS = 4096  # of the weight, where the GEMMs run in another dtype and whole rows are needed
FEWEST = 256  # rows and columns of a tile of which the GEMM is worth its launch; beyond these the budget decides
# Of whole rows: below, the sums of the weight's gradient would cost more than a second pass over its tiles.
FEWEST_TOKENS = 64
BYTES_PER_TILE = 128  # of a row's statistics, from the tile to the merge
Rows = slice | Tensor


@dataclass(frozen=True)
class _Tensors(OpArguments):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ids: Tensor


@dataclass(frozen=True)
class _Computed(OpArguments):
    compute_dtype: str
    memory_budget: int


@dataclass(frozen=True)
class HeadInputs(_Computed, Transform, _Tensors):
    """What the ops from hidden states take first: hidden [N, D], weight [V, D], bias [V], ids [N, K], the transform of
    the logits, with keep_mask [1, V] or [N, V], the dtype of the GEMMs, and how many bytes may be held."""

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.compute_dtype)

    def head(self, ops: Any) -> "Head":
        return Head(
            ops, self.weight, self.bias, self.temperature, self.temperatures, self.softcap, self.logit_scale,
            self.keep_mask, self.dtype,
        )  # fmt: skip


@dataclass(frozen=True)
class Head:
    """The projection onto the vocabulary and the transform of its logits. ops: of a backend, None where only columns of
    the model's own logits are asked for. dtype: of the GEMMs.
    temperatures: [N] or None. keep_mask: [1, V], [N, V] or None."""

    ops: Any
    weight: Tensor
    bias: Tensor | None
    temperature: float
    temperatures: Tensor | None
    softcap: float
    logit_scale: float
    keep_mask: Tensor | None
    dtype: torch.dtype

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def columns(self, at: slice | Tensor) -> Tensor:
        return self.weight[at].to(self.dtype)

    def logits(self, hidden: Tensor, weight: Tensor, at: slice, out: Tensor) -> Tensor:
        """The model's logits of some columns, in `out`, [n, columns]."""
        if self.bias is None:
            return torch.mm(hidden, weight.t(), out=out)
        return torch.addmm(self.bias[at].to(self.dtype), hidden, weight.t(), out=out)

    @property
    def cast_columns(self) -> int:
        """How many columns of the weight are cast at a time; 0: none."""
        return min(self.vocab, CAST_COLUMNS) if self.weight.dtype != self.dtype else 0

    def pieces(self) -> Iterator[slice]:
        """All columns at once, or as many as are cast at a time."""
        return split(self.vocab, self.cast_columns or self.vocab)

    def whole_logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """The model's logits of all columns, in `out`, [n, V]."""
        for at in self.pieces():
            self.logits(hidden, self.columns(at), at, out[:, at])
        return out

    def transform(self, rows: Rows, count: int, at: slice) -> tuple[Any, ...]:
        """The arguments of token_logprobs for `count` rows and some columns."""
        keep = self.keep_mask
        if keep is not None:
            keep = (keep[:, at] if keep.shape[0] == 1 else keep[rows, at]).expand(count, -1)
        per_row = None if self.temperatures is None else self.temperatures[rows]
        return self.temperature, per_row, self.softcap, self.logit_scale, keep


@dataclass(frozen=True)
class Tiles:
    """Of rows x columns logits at most."""

    rows: int
    columns: int

    @property
    def cells(self) -> int:
        return self.rows * self.columns


def split(total: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, total)) for begin in range(0, total, max(size, 1)))


def even(total: int, most: int) -> int:
    """The size of equal parts, of `most` at most: a last one of a few rows would be another GEMM, with other bits."""
    return -(-total // max(-(-total // most), 1))


def fitting_rows(head: Head, columns: int, budget: int, per_column: int = 0) -> int:
    """How many rows of a tile of so many columns fit into a budget, each with its hidden state and statistics."""
    width, size = head.weight.shape[1], head.dtype.itemsize
    cell = size + (head.keep_mask is not None and head.keep_mask.shape[0] > 1)
    per_row = width * size + BYTES_PER_TILE * -(-head.vocab // columns)
    return max(budget - columns * per_column, 0) // (columns * cell + per_row)


def fitting_whole_rows(head: Head, budget: int) -> int:
    """The same for tiles of all columns."""
    cast = head.cast_columns * (head.weight.shape[1] + 1) * head.dtype.itemsize  # with the bias
    return fitting_rows(head, head.vocab, max(budget - cast, 0))


def tiles_of(head: Head, rows: int, budget: int, sums: int = 0) -> Tiles:
    """The largest tiles that fit into the budget less `sums` bytes, or into half of it where sums take more."""
    found = fitting_tiles(head, rows, budget - min(sums, budget // 2))
    if found is None:
        raise too_small(budget, min(head.vocab, FEWEST))
    return found


def fitting_tiles(head: Head, rows: int, free: int) -> Tiles | None:
    """The largest tiles that fit into so many bytes; None where those of the fewest columns do not."""
    width, size, device = head.weight.shape[1], head.dtype.itemsize, head.weight.device.type
    columns = min(head.vocab, MOST_COLUMNS[device])
    # The weights of a column, cast, and a product of its gradient; where tiles are of some rows, its sum too.
    alone = width * size * ((head.weight.dtype != head.dtype) + (device == "cpu"))
    summed = alone + width * sum_dtype(head.dtype).itemsize
    while True:
        if fitting_rows(head, columns, free, alone) >= rows:
            return Tiles(rows, columns)
        fit = fitting_rows(head, columns, free, summed)
        if fit >= FEWEST or (fit > 0 and columns <= FEWEST):
            return Tiles(fit, columns)
        if columns <= FEWEST:
            return None
        columns = max(columns // 2, FEWEST)


def whole_rows_of(head: Head, rows: int, budget: int, sums: int = 0) -> Tiles:
    """Tiles of all columns. sums: as of most_whole_rows."""
    fit = most_whole_rows(head, rows, budget, sums)
    if fit < min(rows, 1):
        raise too_small(budget, head.vocab)
    return Tiles(even(rows, max(fit, 1)), head.vocab)


def most_whole_rows(head: Head, rows: int, budget: int, sums: int) -> int:
    """How many of so many rows fit into a tile of all columns. sums: bytes for the sums of several tiles' products; one
    tile needs none, and its logits may take that memory."""
    return rows if rows <= fitting_whole_rows(head, budget + sums) else fitting_whole_rows(head, budget)


def too_small(budget: int, columns: int) -> ValueError:
    accepted = f"more: a tile of one row and {columns} columns, with what belongs to it, does not fit into half of it"
    return wrong("memory_budget", f"{budget} bytes", accepted)


def compacted(used: Tensor) -> tuple[Tensor | None, int]:
    """(where `used` is true, or None if everywhere; how often). One sync on a GPU."""
    index = used.nonzero().squeeze(1)
    return (None, used.numel()) if index.numel() == used.numel() else (index, index.numel())


def as_tile(memory: Tensor, rows: int, at: slice) -> Tensor:
    columns = at.stop - at.start
    return memory[: rows * columns].view(rows, columns)


def rows_at(index: Tensor | None, at: slice) -> Rows:
    return at if index is None else index[at]
