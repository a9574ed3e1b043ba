"""Divergences of two heads from hidden states, chunk by chunk.

The weight of a token's divergence is known before it is: where gradients are wanted they are made at once, 6 N D V
flops of the trained head and 2 N D' V of the other, and no logits are held beyond a chunk.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..arguments import OpArguments
from ..divergence_ops import OtherTransform
from ..kernel_ops import IGNORED
from .gemm import ProductSum, empty, sum_bytes, sum_dtype
from .head import Head, HeadInputs, compacted, even, rows_at, split, too_small
from .pair import Pair, most_rows
from .ranks import ONE, OneRank
from .token_logprobs import Gradients


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


def run(ops: Any, inputs: LinearDivergenceInputs, grads: Gradients, ranks: OneRank = ONE) -> Tensor:
    """The divergences [N], 0 of ids that are ignored; fills grads, of hidden with sums that ranks.finish ends."""
    heads, hiddens = (inputs.head(ops), inputs.other_head(ops)), (inputs.hidden, inputs.other_hidden)
    head, ids, budget = heads[0], inputs.ids.squeeze(1), inputs.memory_budget
    index, count = compacted(ids != IGNORED)
    value = inputs.hidden.new_zeros(len(ids), dtype=sum_dtype(head.dtype))
    widest = [ranks.widest(one) for one in heads]
    most = most_rows(widest, count, budget, ranks.summed(sum_bytes(grads.weight, head.dtype)))
    if most < min(count, 1):
        raise too_small(budget, 2 * widest[0].vocab)
    rows = even(count, max(most, 1))
    memory, weight_sum = empty(2 * rows * head.vocab, inputs.hidden, head.dtype), None
    if grads.weight is not None:
        weight_sum = ProductSum(grads.weight, head.dtype, once=rows >= count, adds=grads.adds)
    for at in split(count, rows):
        pair = Pair(heads, hiddens, None, rows_at(index, at), memory, inputs.kind, inputs.params, None, ranks)
        value[pair.own.rows] = pair.value
        if grads != Gradients(None, None, None):
            assert inputs.weights is not None
            pair.own.accumulate(pair.differentiate(inputs.weights[pair.own.rows]), weight_sum, grads)
        if grads.hidden is not None:
            ranks.add_up(grads.hidden, pair.own.rows)
    if weight_sum is not None:
        weight_sum.finish()
    return value
