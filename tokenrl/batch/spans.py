"""Spans of a batch, tokens, sequences or segments: what is summed over each of them, in torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout


@dataclass(frozen=True)
class Spans:
    """index: int64 [N], the span of a token; valid: bool [N]; number: a bound of the index, as the spans themselves
    could only be counted with a host sync."""

    index: Tensor
    valid: Tensor
    number: int

    def sum(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.number).index_add_(0, self.index, x)

    def mean(self, x: Tensor) -> Tensor:
        return self.sum(x) / self.counts().clamp(min=1)

    def max(self, x: Tensor) -> Tensor:
        """Of divergences: as none is below zero, the zeros of masked cells and of empty spans are the lowest."""
        return x.new_zeros(self.number).scatter_reduce_(0, self.index, x, "amax")

    def edges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(lowest, highest) of the valid tokens of each span; inf and -inf where there is none."""
        low, high = (
            x.new_full((self.number,), edge).scatter_reduce_(0, self.index, torch.where(self.valid, x, edge), how)
            for edge, how in ((torch.inf, "amin"), (-torch.inf, "amax"))
        )
        return low, high

    def counts(self) -> Tensor:
        """float64 [number]: the valid tokens of each span."""
        return self.sum(self.valid.double())

    def take(self, what: str, x: Tensor) -> Tensor:
        """[number] of x [N], zero in masked cells; what: "sum", "mean" or "max"."""
        return getattr(self, what)(x)


def spans_of(kind: str, layout: Layout, segment_ids: Tensor | None = None) -> Spans:
    tokens, device = layout.num_tokens, layout.cu_seqlens.device
    if kind == "token":
        return Spans(torch.arange(tokens, device=device), layout.valid(), tokens)
    rows = layout.rows()
    if kind == "sequence":
        return Spans(rows, layout.valid(), layout.num_sequences)
    assert segment_ids is not None
    new = span_starts(segment_ids, layout)
    new[1:] |= rows[1:] != rows[:-1]
    return Spans(new.long().cumsum(0), layout.valid(), tokens + 1)


def span_starts(segment_ids: Tensor, layout: Layout) -> Tensor:
    """bool [N]: the valid tokens whose segment id differs from that of the valid token before them.

    segment_ids: flat [N], any integers; masked cells may hold anything and split nothing.
    """
    mask = layout.valid()
    index = torch.arange(mask.numel(), device=mask.device)
    last_valid = torch.where(mask, index, -1).cummax(0).values
    before = torch.cat([last_valid.new_full((1,), -1), last_valid])[:-1]
    return mask & (before >= 0) & (segment_ids[before.clamp(min=0)] != segment_ids)
