"""Divergences of two heads whose rows lie side by side on the ranks of a group, from hidden states.

A chunk has the exchanges of a divergence of logits (divergence_exchange.py). Gradients are made in the forward where
the weights of the tokens are known, as on one rank; else the backward makes the logits anew, with the same exchanges.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..objectives.divergences import Divergence
from ..ops import dispatch, divergence_dispatch, linear_divergence_ops, linear_ops, ranges, reference
from ..ops.arguments import schema
from ..ops.backends import Backend
from ..ops.derivatives import call, register_derivative
from ..ops.kernel_ops import IGNORED, Transform
from ..ops.linear.divergence import LinearDivergenceInputs
from ..ops.linear.gemm import weighed_sum
from ..ops.linear.head import HeadInputs
from .agreement import Agreement
from .divergence_vocabulary_parallel import by_reference
from .linear_vocabulary_parallel import OfAllTokens
from .said import said_of_heads
from .vocab_ranks import ShardInputs, VocabRanks
from .vocabulary_parallel import LIBRARY, NAMESPACE, ONCE

if TYPE_CHECKING:
    from .vocab_shard import VocabShard

OP = "vocab_linear_divergence"


def agree(
    shard: "VocabShard", agreed: Agreement, head: HeadInputs, other: HeadInputs, kind: Divergence, weighed: bool
) -> None:
    """weighed: whether the tokens' weights are known, and with them the gradients."""
    agreed.same(
        rows=len(head.ids), sizes=shard.sizes, kind=kind, **said_of_heads(head, other),
        gradients=dispatch.wanted(head), weighed=weighed,
    )  # fmt: skip
    agreed.contents(rows_read=head.ids != IGNORED)


def linear_divergence(
    given: ShardInputs, chosen: Backend, head: HeadInputs, other: HeadInputs, kind: Divergence, weights: Tensor | None
) -> tuple[Tensor, ...]:
    """As divergence_dispatch.linear_divergence."""
    if not chosen.is_reference:
        inputs = divergence_dispatch.linear_inputs(head, other, kind, weights)
        return call(NAMESPACE, OP, *inputs, *given)[:2]
    ranks, used = VocabRanks(given), (head.ids != IGNORED).squeeze(1)
    own = replace(head, hidden=OfAllTokens.apply(head.hidden, given))
    pair = [reference.head_logits(x) for x in (own, ranks.of_all_tokens(other))]
    transforms = [_expanded(x, logits) for x, logits in zip((head, other), pair, strict=True)]
    (value,) = by_reference(ranks.group, pair, used, transforms, [kind])
    if weights is None:
        return value.new_zeros(()), value
    return weighed_sum(weights, value), value.detach()


def _expanded(head: HeadInputs, logits: Tensor) -> Transform:
    found = divergence_dispatch.transform_of(head)
    return found if found.keep_mask is None else replace(found, keep_mask=found.keep_mask.expand(logits.shape))


def _run(*args: Any) -> tuple[Tensor, ...]:
    inputs, rest = LinearDivergenceInputs.read(args)
    given, _ = ShardInputs.read(rest)
    ranks, dtypes = VocabRanks(given), linear_ops.waiting_dtypes(inputs)
    with torch.autocast(inputs.hidden.device.type, enabled=False), torch.no_grad():
        whole = replace(ranks.of_all_tokens(inputs), other_hidden=ranks.hidden(inputs.other_hidden))
        grads = linear_ops.gradients_of(whole, linear_divergence_ops.now(inputs), [given.wire_dtype, *dtypes[1:]])
        found = linear_divergence_ops.evaluated(ranges.kernels(given.kernels), whole, grads, ranks)
        return *found, *ranks.results(grads, inputs.hidden, dtypes)


LIBRARY.define(
    OP + schema(LinearDivergenceInputs, ShardInputs, returns=f"(Tensor loss, Tensor value, {linear_ops.GRADS})"),
    tags=linear_ops.HOST_READS,
)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl(OP, _run, _key)
torch.library.register_fake(f"{NAMESPACE}::{OP}", linear_divergence_ops.fake)
register_derivative(
    NAMESPACE, OP, linear_divergence_ops.save, linear_divergence_ops.backward_of(NAMESPACE, OP), 3, ONCE
)
