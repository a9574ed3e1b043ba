"""Divergences of two heads from hidden states, chunk by chunk: whole rows of both heads' logits side by side.

The weight of a token's divergence is known before it is: where gradients are wanted they are made at once, 6 N D V
flops of the trained head and 2 N D' V of the other, and no logits are held beyond a chunk.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..arguments import OpArguments
from ..divergence_ops import OtherTransform
from ..kernel_ops import IGNORED
from .chunk import LogitChunk
from .gemm import ProductSum, empty, sum_dtype
from .head import Head, HeadInputs, compacted, rows_at, split, whole_rows_of
from .token_logprobs import Gradients

TILES = 3  # of a chunk: both heads' logits and the gradient of one's


@dataclass(frozen=True)
class _OtherTensors(OpArguments):
    other_hidden: Tensor
    other_weight: Tensor
    other_bias: Tensor | None


@dataclass(frozen=True)
class _Weighed(OpArguments):
    """weights [N]: of the tokens' divergences in the loss; None: there is no loss. wanted: the gradients of hidden,
    weight, bias."""

    kind: str
    params: list[float]
    weights: Tensor | None
    wanted: list[bool]


@dataclass(frozen=True)
class LinearDivergenceInputs(_Weighed, OtherTransform, _OtherTensors, HeadInputs):
    """Of op linear_divergence; its ids are [N, 1]."""

    def other_head(self, ops: Any) -> Head:
        return Head(
            ops, self.other_weight, self.other_bias, self.other_temperature, self.other_temperatures,
            self.other_softcap, self.other_logit_scale, self.other_keep_mask, self.dtype,
        )  # fmt: skip


def run(ops: Any, inputs: LinearDivergenceInputs, grads: Gradients) -> Tensor:
    """The divergences [N], 0 of ids that are ignored; fills grads."""
    head, other = inputs.head(ops), inputs.other_head(ops)
    used = (inputs.ids != IGNORED).squeeze(1)
    index, count = compacted(used)
    value = inputs.hidden.new_zeros(len(used), dtype=sum_dtype(head.dtype))
    rows = min(whole_rows_of(one, count, inputs.memory_budget // TILES).rows for one in (head, other))
    memory, other_memory = (empty(rows * one.vocab, inputs.hidden, head.dtype) for one in (head, other))
    weight_sum = None
    if grads.weight is not None:
        weight_sum = ProductSum(grads.weight, head.dtype, once=rows >= count, adds=grads.adds)
    for at in split(count, rows):
        own = LogitChunk(head, inputs.hidden, rows_at(index, at), memory)
        beside = LogitChunk(other, inputs.other_hidden, own.rows, other_memory)
        given = (None, *own.transform(), *beside.transform(), inputs.kind, inputs.params)  # DivergenceInputs
        found, by_p, _, statistics = ops.divergence(own.logits, beside.logits, None, *given)
        value[own.rows] = found
        if inputs.weights is not None and any(inputs.wanted):
            weights = inputs.weights[own.rows]
            own.logits = ops.divergence_backward(weights, own.logits, beside.logits, by_p, "logits", statistics, *given)
            own.accumulate(1.0, weight_sum, grads)
    if weight_sum is not None:
        weight_sum.finish()
    return value
