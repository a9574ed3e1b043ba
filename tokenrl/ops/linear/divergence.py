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
from .chunk import Chunk
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


def run(ops: Any, inputs: LinearDivergenceInputs, grads: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    """(the divergences [N], the ids' log-probs of both heads [N]), 0 of ids that are ignored; fills grads."""
    head, other, ids = inputs.head(ops), inputs.other_head(ops), inputs.ids.squeeze(1)
    index, count = compacted(ids != IGNORED)
    value, logp, other_logp = (inputs.hidden.new_zeros(len(ids), dtype=sum_dtype(head.dtype)) for _ in range(3))
    rows = min(whole_rows_of(one, count, inputs.memory_budget // TILES).rows for one in (head, other))
    memory, other_memory = (empty(rows * one.vocab, inputs.hidden, head.dtype) for one in (head, other))
    weight_sum = None
    if grads.weight is not None:
        weight_sum = ProductSum(grads.weight, head.dtype, once=rows >= count, adds=grads.adds)
    for at in split(count, rows):
        own = Chunk(head, inputs.hidden, ids, rows_at(index, at), memory)
        beside = Chunk(other, inputs.other_hidden, ids, own.rows, other_memory)
        statistics = (own.lse, own.lse_rest, beside.lse, beside.lse_rest, None)
        given = (*statistics, *own.transform(), *beside.transform(), inputs.kind, inputs.params)  # DivergenceInputs
        found, by_p, _ = ops.divergence(own.logits, beside.logits, *given)
        value[own.rows], logp[own.rows], other_logp[own.rows] = found, own.logp, beside.logp
        if inputs.weights is not None and any(inputs.wanted):
            weights = inputs.weights[own.rows]
            own.logits = ops.divergence_backward(weights, own.logits, beside.logits, by_p, "logits", *given)
            own.accumulate(1.0, weight_sum, grads)
    if weight_sum is not None:
        weight_sum.finish()
    return value, logp, other_logp
