"""Who holds the rows of a head: one process, or ranks side by side (tokenrl/distributed/exchange.py).

The passes over chunks are the same for both. What they ask of the ranks is here, answered for one: there is nothing to
exchange.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..divergence_ops import DivergenceInputs
from .chunk import Chunk
from .gemm import empty
from .head import Head, HeadInputs, Rows

AnyHead = TypeVar("AnyHead", bound=HeadInputs)


class OneRank:
    """at_once: chunks whose logits are held together; of several, one is exchanged while the next is made."""

    at_once = 1

    def widest(self, head: Head) -> Head:
        """The head by whose size chunks are cut: the same for all ranks."""
        return head

    def of_all_tokens(self, inputs: AnyHead) -> AnyHead:
        """With the hidden states of all tokens, where these are of some."""
        return inputs

    def travels_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which hidden's gradient, of this one, is made and summed."""
        return dtype

    def summed(self, sums: int) -> int:
        """Of the bytes of the weight's gradients those that chunks are cut by: on several ranks each has its own, and
        they must not decide."""
        return sums

    def own_ids(self, ids: Tensor) -> Tensor:
        """ids of the whole vocabulary as those of this rank's rows."""
        return ids

    def whole(self, chunks: Iterator[Chunk], ids: Tensor) -> Iterator[Chunk]:
        """The chunks, made of own_ids, with the statistics of the whole vocabulary. ids: of it, [N] or [N, K]."""
        return chunks

    def whole_pair(self, own: Chunk, other: Chunk, ids: Tensor) -> None:
        """Gives both heads' chunks of the same tokens the statistics of the whole vocabulary. ids: of it, [N]."""

    def divergence(
        self, ops: Any, logits: Tensor, other_logits: Tensor, statistics: Tensor | None, given: DivergenceInputs
    ) -> tuple[Tensor, ...]:
        """Op divergence of ops for these columns -> that of the whole vocabulary. statistics: of it; None: not known
        yet."""
        found: tuple[Tensor, ...] = ops.divergence(logits, other_logits, statistics, *given)
        return found

    def merged(self, statistics: list[Tensor], ids: Tensor) -> list[Tensor]:
        """Results of token_logprobs for own_ids -> those of the whole vocabulary. ids: of it, [N, K]."""
        return statistics

    def add_up(self, hidden_grad: Tensor, rows: Rows) -> None:
        """Begins to sum these rows, final on this rank, over the ranks."""

    def finish(self, hidden_grad: Tensor) -> Tensor:
        """The sums, of this rank's tokens, when all rows have begun."""
        return hidden_grad


ONE = OneRank()


def chunks_of(head: Head, hidden: Tensor, ids: Tensor, rows: Sequence[Rows], ranks: OneRank = ONE) -> Iterator[Chunk]:
    """Of these rows each, one after the other, in memory that they share. ids: of the whole vocabulary."""
    most = max((at.stop - at.start if isinstance(at, slice) else at.numel() for at in rows), default=0)
    memory = [empty(most * head.vocab, hidden, head.dtype) for _ in range(min(ranks.at_once, len(rows)))]
    own = ranks.own_ids(ids)
    made = (Chunk.of(head, hidden, own, at, memory[k % len(memory)]) for k, at in enumerate(rows))
    return ranks.whole(made, ids)
