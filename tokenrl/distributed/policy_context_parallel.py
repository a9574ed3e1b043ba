"""Policy losses of a batch whose tokens lie on the ranks of a group: log-probs and entropies are gathered, and every
rank computes the loss of the whole batch, of whose gradient its tokens' part is its own."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..batch.layout import Layout
from ..errors import wrong
from ..ops import dispatch
from ..ops.backends import Backend
from ..ops.dispatch import PolicyLossInputs
from ..ops.linear.head import HeadInputs
from . import linear_vocabulary_parallel
from .said import said_of_loss

if TYPE_CHECKING:
    from .agreement import Agreement
    from .context_shard import ContextShard
    from .vocab_shard import VocabShard


def of_batch(
    shard: "ContextShard", logp: Tensor, beside: Tensor | None, check: bool, name: str
) -> tuple[Tensor, Tensor | None]:
    """[N] of the own tokens' [n], in one exchange."""
    if beside is None:
        return shard.gathered(logp, check=check), None
    if beside.shape != logp.shape:
        raise wrong(name, f"shape {list(beside.shape)}", f"one per own token, {list(logp.shape)}")
    return _both(shard, logp, beside.to(logp.dtype), check)


def _both(shard: "ContextShard", logp: Tensor, entropy: Tensor, check: bool) -> tuple[Tensor, Tensor]:
    whole = shard.gathered(torch.stack([logp, entropy], -1), check=check)
    return whole[..., 0].contiguous(), whole[..., 1].contiguous()


def agree(
    shard: "ContextShard", agreed: "Agreement", chosen: Backend, layout: Layout, head: HeadInputs,
    main_grad: Tensor | None, inputs: PolicyLossInputs,
) -> None:  # fmt: skip
    if layout.width is not None:
        raise wrong("cu_seqlens", None, "that of the packed batch, beside context")
    agreed.same(pieces=shard.pieces, **said_of_loss(layout, head, inputs))
    agreed.contents(ids=head.ids, mask=layout.valid(), cu_seqlens=layout.cu_seqlens)


def linear_policy_loss(
    shard: "ContextShard", vocab: "VocabShard | None", reduce_hidden_grad: bool, chosen: Backend, layout: Layout,
    head: HeadInputs, main_grad: Tensor | None, inputs: PolicyLossInputs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As dispatch.linear_policy_loss; of head hidden is the own tokens', all else that of the batch."""
    own = _of_own_tokens(shard, dispatch.of_valid_tokens(layout, head))
    if vocab is None:
        keep = dispatch.to_keep(chosen, own, logp_alone=inputs.regularizers.entropy_coef == 0)
        logp, entropy = dispatch.linear_token_logprobs(chosen, own, [], main_grad, keep)[:2]
    else:
        given = vocab.inputs(chosen, own, 1, reduce_hidden_grad)
        found = linear_vocabulary_parallel.results(chosen, given, own, [], main_grad)
        logp, entropy, keep = found["logp"], found["entropy"], "nothing"
    whole = _both(shard, logp.squeeze(1), entropy, check=False)
    return dispatch.of_statistics(chosen, layout, *whole, inputs, again=keep == "nothing")


def _of_own_tokens(shard: "ContextShard", head: HeadInputs) -> HeadInputs:
    keep, temperatures = head.keep_mask, head.temperatures
    if keep is not None and keep.shape[0] > 1:
        keep = shard.take(keep)
    temperatures = None if temperatures is None else shard.take(temperatures)
    return replace(head, ids=shard.take(head.ids), temperatures=temperatures, keep_mask=keep)
