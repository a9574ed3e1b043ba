"""A chunk of tokens from hidden states: its logits, in memory that all chunks use, and their gradients there."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from .gemm import ProductSum, add_product, column_sums, sum_dtype
from .head import FEWEST_TOKENS, Head, Rows, as_tile, compacted, split
from .lift import lifted
from .token_logprobs import Gradients

WORTH_MOVING = 7 / 8  # tokens with a gradient, of a chunk: at most so many are moved together before its GEMMs


class Logits:
    """Some tokens' logits, and then their gradients."""

    PER_TOKEN: tuple[str, ...] = ("states",)

    def __init__(self, head: Head, states: Tensor, rows: Rows, logits: Tensor):
        """states, logits: of its tokens alone, which are these rows of all."""
        self.head, self.rows, self.states, self.logits = head, rows, states, logits

    @staticmethod
    def made(head: Head, hidden: Tensor, rows: Rows, memory: Tensor) -> "Logits":
        """Of these rows, in `memory`."""
        states = hidden[rows].to(head.dtype)
        tile = as_tile(memory, states.shape[0], slice(0, head.vocab))
        return Logits(head, states, rows, head.whole_logits(states, tile))

    def transform(self) -> tuple[Any, ...]:
        return self.head.transform(self.rows, self.states.shape[0], slice(0, self.head.vocab))

    def accumulate(self, by: float, weight_sum: ProductSum | None, grads: Gradients) -> None:
        """Adds what the gradients of the logits, in their place, make of hidden, weight and bias, times `by`."""
        if grads.hidden is not None:
            grads.hidden[self.rows] = self._hidden_gradient(by, grads.hidden.dtype)
        if weight_sum is not None:
            weight_sum.add(self.logits.t(), self.states, by)
        if grads.bias is not None:
            grads.bias.add_(column_sums(self.logits), alpha=by)

    def part(self, some: slice) -> Self:
        """Some of its tokens, in the same memory."""
        found = copy.copy(self)
        found._select(some)
        found.logits = self.logits[some]
        return found

    def _select(self, some: Rows) -> None:
        """All but the logits."""
        if not isinstance(self.rows, slice):
            self.rows = self.rows[some]
        elif isinstance(some, slice):
            self.rows = slice(self.rows.start + some.start, self.rows.start + some.stop)
        else:
            self.rows = some + self.rows.start
        for name in self.PER_TOKEN:
            setattr(self, name, getattr(self, name)[some])

    def _hidden_gradient(self, by: float, dtype: torch.dtype) -> Tensor:
        if not self.head.cast_columns and dtype == self.head.dtype:
            return torch.mm(self.logits, self.head.weight)
        total = self.states.new_zeros(self.states.shape, dtype=sum_dtype(self.head.dtype))
        for at in self.head.pieces():
            add_product(total, self.logits[:, at], self.head.columns(at), by)
        return total.to(dtype)


class Chunk(Logits):
    """With the log-probs [n] and entropies [n]."""

    PER_TOKEN = ("states", "ids", "logp", "entropy", "lse", "lse_rest")

    def __init__(self, of: Logits, ids: Tensor):
        """ids: of its tokens alone."""
        super().__init__(of.head, of.states, of.rows, of.logits)
        self.ids = ids
        stats = self.head.ops.token_logprobs(self.logits, ids, *self.transform(), [], False)
        self.logp, self.entropy, self.lse, self.lse_rest, *_ = stats

    @classmethod
    def of(cls, head: Head, hidden: Tensor, ids: Tensor, rows: Rows, memory: Tensor) -> "Chunk":
        """Of some of the tokens; ids, hidden: of all."""
        return cls(Logits.made(head, hidden, rows, memory), ids[rows])

    def backward(
        self, coef: Tensor, grad_entropy: Tensor | None, weight_sum: ProductSum | None, grads: Gradients
    ) -> None:
        """coef, grad_entropy: of all tokens."""
        coef, grad_entropy = coef[self.rows], None if grad_entropy is None else grad_entropy[self.rows]
        index, count = compacted(coef != 0 if grad_entropy is None else (coef != 0) | (grad_entropy != 0))
        if index is not None and count <= WORTH_MOVING * self.logp.numel():
            coef, grad_entropy = coef[index], None if grad_entropy is None else grad_entropy[index]
            self._keep(index)
        upstream, by = lifted(self.head, self.rows, (coef, grad_entropy, None, None), self.states)
        self.differentiate(upstream)
        self.accumulate(by, weight_sum, grads)

    def differentiate(self, upstream: Sequence[Tensor | None]) -> None:
        """Turns the logits into their gradients. upstream: by log-probs, entropies, lse and log_sum_sq_probs."""
        self.head.ops.token_logprobs_backward_(
            *upstream, self.logits, self.ids, self.lse, self.lse_rest, self.entropy, self.lse.new_empty(0),
            *self.transform(),
        )  # fmt: skip

    def _keep(self, index: Tensor) -> None:
        """Leaves out the other tokens; logits move up in their own memory, in order, an eighth at a time."""
        for to in split(index.numel(), -(-max(self.logits.shape[0], FEWEST_TOKENS) // 8)):
            self.logits[to] = self.logits[index[to]]
        self.logits = self.logits[: index.numel()]
        self._select(index)
