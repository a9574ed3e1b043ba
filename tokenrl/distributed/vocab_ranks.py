"""What the passes over chunks (tokenrl/ops/linear/ranks.py) ask of the ranks that hold a head side by side."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import wire
from ..ops import linear_ops
from ..ops.arguments import OpArguments
from ..ops.divergence_ops import DivergenceInputs
from ..ops.kernel_ops import RESULTS
from ..ops.linear.chunk import Chunk
from ..ops.linear.head import Head, Rows
from ..ops.linear.ranks import AnyHead, OneRank
from ..ops.linear.token_logprobs import Gradients
from .divergence_exchange import of_vocabulary
from .exchange import in_order, shard_ids, start

SUMS = ("all_reduce", "reduce_scatter", "none")


@dataclass(frozen=True)
class ShardInputs(OpArguments):
    """Of ops beside vocab. kernels: their namespace. sizes: rows of the head on each rank. hidden_sum: what becomes of
    the ranks' shares of hidden's gradient, one of SUMS, and in which dtype they travel; for "reduce_scatter" hidden is
    gathered from the ranks' parts, side by side in each of so many sequences."""

    kernels: str
    group: str
    sizes: list[int]
    hidden_sum: str
    hidden_sum_dtype: str
    sequences: int

    @property
    def wire_dtype(self) -> torch.dtype:
        return getattr(torch, self.hidden_sum_dtype)


class VocabRanks(OneRank):
    """Those of one call."""

    at_once = 2

    def __init__(self, given: ShardInputs):
        self.given, self.group = given, wire.group_named(given.group)
        self._sum: Callable[[], None] | None = None

    def widest(self, head: Head) -> Head:
        rows = max(max(self.given.sizes), 1)
        return replace(head, weight=head.weight.new_empty(()).expand(rows, head.weight.shape[1]))

    def travels_in(self, dtype: torch.dtype) -> torch.dtype:
        return self.given.wire_dtype

    def summed(self, sums: int) -> int:
        return 0

    def own_ids(self, ids: Tensor) -> Tensor:
        return shard_ids(ids, self.given.sizes, self.group.rank())

    def whole(self, chunks: Iterator[Chunk], ids: Tensor) -> Iterator[Chunk]:
        """Each while the next one's numbers travel."""
        before = None
        for chunk in chunks:
            arrive = self._start(chunk, ids)
            if before is not None:
                yield before()
            before = arrive
        if before is not None:
            yield before()

    def _start(self, chunk: Chunk, ids: Tensor) -> Callable[[], Chunk]:
        ids = ids[chunk.rows].view(len(chunk.lse), -1)
        own = {"logp": chunk.logp.view(ids.shape), "entropy": chunk.entropy, "lse": chunk.lse,
               "lse_rest": chunk.lse_rest}  # fmt: skip
        merged = start(own, ids, None, [], self.group, self.given.sizes)

        def arrive() -> Chunk:
            found = merged()
            chunk.logp = found["logp"].view_as(chunk.logp)
            chunk.entropy, chunk.lse, chunk.lse_rest = found["entropy"], found["lse"], found["lse_rest"]
            return chunk

        return arrive

    def whole_pair(self, own: Chunk, other: Chunk, ids: Tensor) -> None:
        """In one exchange: the rows of one head, then those of the other."""
        names = ("logp", "entropy", "lse", "lse_rest")
        both = {name: torch.cat([getattr(own, name), getattr(other, name)]) for name in names}
        ids = ids[own.rows].repeat(2)[:, None]
        both["logp"] = both["logp"][:, None]
        found = start(both, ids, None, [], self.group, self.given.sizes)()
        found["logp"] = found["logp"].squeeze(1)
        for name in names:
            of_own, of_other = found[name].tensor_split(2)
            setattr(own, name, of_own)
            setattr(other, name, of_other)

    def divergence(
        self, ops: Any, logits: Tensor, other_logits: Tensor, statistics: Tensor | None, given: DivergenceInputs
    ) -> tuple[Tensor, ...]:
        return of_vocabulary(ops, self.group, logits, other_logits, statistics, given)

    def merged(
        self, statistics: list[Tensor], ids: Tensor, keep_mask: Tensor | None = None, outputs: Sequence[str] = ()
    ) -> list[Tensor]:
        """keep_mask: [1, V_r] or [N, V_r]; outputs: beside those that always are, as for op token_logprobs."""
        own = dict(zip(RESULTS, statistics, strict=True))
        return list(in_order(start(own, ids, keep_mask, list(outputs), self.group, self.given.sizes)()))

    def hidden(self, own: Tensor) -> Tensor:
        """[N, D] of what the ranks have of it."""
        if self.given.hidden_sum != "reduce_scatter":
            return own
        world, width = self.group.size(), own.shape[1]
        every = wire.all_gather(own, self.group).view(world, self.given.sequences, -1, width)
        return every.transpose(0, 1).reshape(-1, width)

    def of_all_tokens(self, inputs: AnyHead) -> AnyHead:
        return replace(inputs, hidden=self.hidden(inputs.hidden))

    def results(self, grads: Gradients, own_hidden: Tensor, dtypes: list[torch.dtype]) -> list[Tensor]:
        """Of linear_ops.results_of, hidden's of this rank's tokens, rounded at the end."""
        hidden, *others = linear_ops.results_of(grads, own_hidden, dtypes)
        return [hidden if grads.hidden is None else self.finish(grads.hidden).to(dtypes[0]), *others]

    def add_up(self, hidden_grad: Tensor, rows: Rows) -> None:
        if self.given.hidden_sum != "all_reduce":
            return
        self._end_sum()  # one at a time: rows that are not side by side are copied
        some = hidden_grad[rows]
        arrive = wire.start_all_reduce(some, self.group)

        def end() -> None:
            arrive()
            if isinstance(rows, Tensor):
                hidden_grad[rows] = some

        self._sum = end

    def _end_sum(self) -> None:
        if self._sum is not None:
            self._sum()
            self._sum = None

    def finish(self, hidden_grad: Tensor) -> Tensor:
        self._end_sum()
        if self.given.hidden_sum != "reduce_scatter":
            return hidden_grad
        width, world = hidden_grad.shape[1], self.group.size()
        parts = hidden_grad.view(self.given.sequences, world, -1, width).transpose(0, 1)
        return wire.reduce_scatter(parts.contiguous(), self.group).view(-1, width)
