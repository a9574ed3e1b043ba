"""linear_policy_loss with a head whose rows lie side by side on the ranks of a group.

A chunk's statistics travel, 16 bytes a token, while the logits of the next one are made; each rank then has the same
log-probs, coefficients and metrics, and of them the gradients of its own rows. The shares of hidden's gradient are
summed chunk by chunk, in the forward: the backward multiplies, and has no collective.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..batch.layout import Layout
from ..ops import dispatch, linear_ops, ranges
from ..ops.arguments import schema
from ..ops.backends import Backend
from ..ops.derivatives import call, register_derivative
from ..ops.dispatch import PolicyLossInputs
from ..ops.linear import policy_loss
from ..ops.linear.evaluation import LinearPolicyLossInputs
from ..ops.linear.head import HeadInputs
from . import linear_vocabulary_parallel
from .agreement import Agreement
from .said import said_of_loss
from .vocab_ranks import ShardInputs, VocabRanks
from .vocabulary_parallel import LIBRARY, NAMESPACE, ONCE

if TYPE_CHECKING:
    from .vocab_shard import VocabShard

OP = "vocab_linear_policy_loss"


def agree(
    shard: "VocabShard", agreed: Agreement, chosen: Backend, layout: Layout, head: HeadInputs, main_grad: Tensor | None,
    inputs: PolicyLossInputs,
) -> None:  # fmt: skip
    """That all ranks compute the same loss of the same tokens; and that what the first chunk needs fits into memory."""
    agreed.same(sizes=shard.sizes, **said_of_loss(layout, head, inputs))
    agreed.contents(ids=head.ids, mask=layout.valid(), cu_seqlens=layout.cu_seqlens)
    if not chosen.is_reference:
        linear_vocabulary_parallel.check_budget(head, any(dispatch.wanted(head)))


def linear_policy_loss(
    shard: "VocabShard", reduce_hidden_grad: bool, chosen: Backend, layout: Layout, head: HeadInputs,
    main_grad: Tensor | None, inputs: PolicyLossInputs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As dispatch.linear_policy_loss."""
    sequences = 1 if layout.width is None else layout.num_sequences
    given = shard.inputs(chosen, head, sequences, reduce_hidden_grad)
    if dispatch.in_one_op(chosen, inputs):
        one_op = dispatch.one_op_inputs(layout, head, main_grad, inputs)
        return call(NAMESPACE, OP, *one_op, *given)[:4]
    found = linear_vocabulary_parallel.results(chosen, given, dispatch.of_valid_tokens(layout, head), [], main_grad)
    return dispatch.of_statistics(chosen, layout, found["logp"].squeeze(1), found["entropy"], inputs, again=True)


def _run(*args: Any) -> tuple[Tensor, ...]:
    inputs, rest = LinearPolicyLossInputs.read(args)
    given, _ = ShardInputs.read(rest)
    ranks, dtypes = VocabRanks(given), linear_ops.waiting_dtypes(inputs, inputs.main_grad)
    with torch.autocast(inputs.hidden.device.type, enabled=False), torch.no_grad():
        whole = ranks.of_all_tokens(inputs)
        grads = linear_ops.gradients_of(whole, inputs.wanted, [given.wire_dtype, *dtypes[1:]])
        results = policy_loss.run(ranges.kernels(given.kernels), whole, grads, ranks)
        return *results, *ranks.results(grads, inputs.hidden, dtypes)


LIBRARY.define(OP + schema(LinearPolicyLossInputs, ShardInputs, returns=f"({linear_ops.LOSS}, {linear_ops.GRADS})"))
for _key in ("CPU", "CUDA"):
    LIBRARY.impl(OP, _run, _key)
torch.library.register_fake(f"{NAMESPACE}::{OP}", linear_ops.fake_policy_loss)
register_derivative(NAMESPACE, OP, linear_ops.save_policy_loss, linear_ops.policy_loss_backward(NAMESPACE), 3, ONCE)
