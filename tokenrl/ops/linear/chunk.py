"""A chunk of tokens from hidden states: its logits, in memory that all chunks use, and their gradients there."""

from typing import Any

import torch
from torch import Tensor

from .gemm import ProductSum, add_product, column_sums, sum_dtype
from .head import FEWEST_TOKENS, Head, Rows, as_tile, compacted, split
from .lift import lifted
from .token_logprobs import Gradients

WORTH_MOVING = 7 / 8  # tokens with a gradient, of a chunk: at most so many are moved together before its GEMMs


class LogitChunk:
    """Some tokens' logits in `memory`, and then their gradients."""

    def __init__(self, head: Head, hidden: Tensor, rows: Rows, memory: Tensor):
        self.head, self.rows = head, rows
        self.states = hidden[rows].to(head.dtype)
        self.logits = as_tile(memory, self.states.shape[0], slice(0, head.vocab))
        head.whole_logits(self.states, self.logits)

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

    def _hidden_gradient(self, by: float, dtype: torch.dtype) -> Tensor:
        if not self.head.cast_columns and dtype == self.head.dtype:
            return torch.mm(self.logits, self.head.weight)
        total = self.states.new_zeros(self.states.shape, dtype=sum_dtype(self.head.dtype))
        for at in self.head.pieces():
            add_product(total, self.logits[:, at], self.head.columns(at), by)
        return total.to(dtype)


class Chunk(LogitChunk):
    """And their log-probs [n] and entropies [n]."""

    def __init__(self, head: Head, hidden: Tensor, ids: Tensor, rows: Rows, memory: Tensor):
        super().__init__(head, hidden, rows, memory)
        self.ids = ids[rows]
        stats = head.ops.token_logprobs(self.logits, self.ids, *self.transform(), [], False)
        self.logp, self.entropy, self.lse, self.lse_rest, *_ = stats

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
        self.head.ops.token_logprobs_backward_(
            *upstream, self.logits, self.ids, self.lse, self.lse_rest, self.entropy, self.lse.new_empty(0),
            *self.transform(),
        )  # fmt: skip
        self.accumulate(by, weight_sum, grads)

    def _keep(self, index: Tensor) -> None:
        """Leaves out the other tokens; logits move up in their own memory, in order, an eighth at a time."""
        self.rows = index + self.rows.start if isinstance(self.rows, slice) else self.rows[index]
        for to in split(index.numel(), -(-max(self.logits.shape[0], FEWEST_TOKENS) // 8)):
            self.logits[to] = self.logits[index[to]]
        self.logits = self.logits[: index.numel()]
        self.states, self.ids, self.entropy = self.states[index], self.ids[index], self.entropy[index]
        self.lse, self.lse_rest = self.lse[index], self.lse_rest[index]
