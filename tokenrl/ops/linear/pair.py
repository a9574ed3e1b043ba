"""Two heads' chunks of the same tokens: whole rows of both heads' logits side by side, and a divergence of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..divergence_ops import DivergenceInputs
from .chunk import Chunk, Logits
from .head import Head, Rows, as_tile, most_whole_rows, split
from .lift import lift
from .ranks import ONE, OneRank

PARTS = 16  # of a pair: one is turned into its gradient at a time, in memory beside the logits


def most_rows(heads: Sequence[Head], count: int, budget: int, sums: int) -> int:
    """How many of so many tokens fit into a chunk of one head, or into a pair; 0: none. sums: as of most_whole_rows."""
    if len(heads) == 1:
        return most_whole_rows(heads[0], count, budget, sums)
    alone = max(head.vocab * head.dtype.itemsize for head in heads)  # a part is a row at least
    share, of_sums = (max(size, 0) * PARTS // (2 * PARTS + 1) for size in (budget - alone, sums))
    return min(most_whole_rows(head, count, share, of_sums) for head in heads)


def shared(heads: Sequence[Head], hiddens: Sequence[Tensor]) -> bool:
    """Whether both are one: then one GEMM makes both their logits."""
    (own, other), (width, other_width) = heads, (x.shape[1] for x in hiddens)
    both = ((own.weight, other.weight), (own.bias, other.bias))
    return own.dtype == other.dtype and width == other_width and all(_same(*tensors) for tensors in both)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


class Pair:
    """value: the tokens' divergences [n]. Of ids also their log-probs: own and other are Chunks."""

    own: Any
    other: Any

    def __init__(
        self, heads: Sequence[Head], hiddens: Sequence[Tensor], ids: Tensor | None, rows: Rows, memory: Tensor,
        kind: str, params: list[float], counted: Tensor | None = None, ranks: OneRank = ONE,
    ):  # fmt: skip
        """The first head is the trained one. memory: for both heads' logits. counted: bool [n], of the tokens that have
        a divergence; None: all."""
        self.kind, self.params, self.counted = kind, params, counted
        self.own, self.other = _logits(heads, hiddens, rows, memory)
        statistics = None if ids is None else self._log_probs(ids, ranks)
        given = self._given(self.own, self.other, slice(None))
        both = self.own.logits, self.other.logits
        self.value, self.by_p, _, self.statistics = ranks.divergence(heads[0].ops, *both, statistics, given)

    def _log_probs(self, ids: Tensor, ranks: OneRank) -> Tensor:
        """The statistics of both, as op divergence takes them."""
        own_ids = ranks.own_ids(ids)[self.own.rows]
        self.own, self.other = Chunk(self.own, own_ids), Chunk(self.other, own_ids)
        ranks.whole_pair(self.own, self.other, ids)
        return torch.stack([x for chunk in (self.own, self.other) for x in (chunk.lse, chunk.lse_rest)])

    def _given(self, own: Logits, other: Logits, some: slice) -> DivergenceInputs:
        """Of some tokens."""
        counted = None if self.counted is None else self.counted[some]
        return DivergenceInputs.read((counted, *own.transform(), *other.transform(), self.kind, self.params))[0]

    def differentiate(self, by_value: Tensor, by_logp: Tensor | None = None) -> float:
        """Turns the trained head's logits into 2^k times their gradient; 2^-k. by_value, by_logp: the loss's gradients
        [n] by the divergences and the log-probs."""
        ops = self.own.head.ops
        up = self._lift(by_value, by_logp)
        for some in _parts(self.value.shape[0]):
            own, other = self.own.part(some), self.other.part(some)
            given = self._given(own, other, some)
            of_value = ops.divergence_backward(
                up * by_value[some], own.logits, other.logits, self.by_p[some], "logits",
                self.statistics[:, some].contiguous(), *given,
            )  # fmt: skip
            if by_logp is None:
                own.logits.copy_(of_value)
            else:
                own.differentiate((up * by_logp[some], None, None, None))
                own.logits.add_(of_value)
        return 1 / up

    def _lift(self, by_value: Tensor, by_logp: Tensor | None) -> float:
        """A divergence D is a sum whose terms below 0 are above -1 in all; so are the parts of a gradient: the largest,
        and half of their sum, are below D + 1."""
        finite = torch.where(self.value.isfinite(), self.value, 0)
        size = by_value.abs() * (finite.abs() + 1)
        return lift(self.own.head, self.own.rows, size if by_logp is None else size + by_logp.abs(), self.own.states)


def _parts(count: int) -> Iterator[slice]:
    return split(count, -(-count // PARTS))


def _logits(heads: Sequence[Head], hiddens: Sequence[Tensor], rows: Rows, memory: Tensor) -> tuple[Logits, Logits]:
    own, other = heads
    if not shared(heads, hiddens):
        room = memory.numel() // 2
        both = zip(heads, hiddens, (memory[:room], memory[room:]), strict=True)
        first, second = (Logits.made(head, hidden, rows, part) for head, hidden, part in both)
        return first, second
    states = torch.cat([hidden[rows].to(own.dtype) for hidden in hiddens])
    logits = own.whole_logits(states, as_tile(memory, states.shape[0], slice(0, own.vocab)))
    count = states.shape[0] // 2
    return Logits(own, states[:count], rows, logits[:count]), Logits(other, states[count:], rows, logits[count:])
