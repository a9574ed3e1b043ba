"""linear_policy_loss: policy_loss from hidden states and the head, without the logits."""

import dataclasses
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..batch.checks import as_saved, check_name
from ..batch.layout import Layout, layout_of
from ..errors import wrong
from ..logprobs.from_hidden import check_main_grad_backend, head_arguments
from ..logprobs.from_logits import IGNORED, check_ids
from ..logprobs.vocabulary import Vocabulary
from ..objectives.metrics import LinearMetrics
from ..objectives.policy import Objective, find_objective
from ..observed import observed
from ..ops import backends, dispatch
from ..ops.linear.gemm import sum_dtype
from .policy_arguments import BatchOnRanks, check_beside_context, corrected, policy_loss_inputs, ranks_of
from .regularizers import regularizers_of


@observed
def linear_policy_loss(
    objective: str | Objective,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages_per: str | None = None,
    segment_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    correction: dict | None = None,
    token_weight: Tensor | None = None,
    aggregation: str | None = None,
    normalizer: float | Tensor | None = None,
    ref_logp: Tensor | None = None,
    kl: str | Objective = "kl_k3",
    kl_coef: float = 0.0,
    kl_weight: Tensor | None = None,
    kl_ratio: str | None = None,
    entropy_coef: float = 0.0,
    entropy_weight: Tensor | None = None,
    ignore_index: int = IGNORED,
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    main_grad: Tensor | None = None,
    on_policy: bool = False,
    without_advantage: str = "skip",
    vocab: Vocabulary | None = None,
    context: BatchOnRanks | None = None,
    reduce_hidden_grad: bool = True,
    check: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, LinearMetrics]:
    """policy_loss of the log-probs of linear_token_logprobs, with its gradients, in one pass over chunks of tokens.

        loss = sum_t w_t (gate(s_t) + kl_coef r_t kl_t - entropy_coef entropy_t),   logits = hidden @ weight^T + bias

    The loss carries the gradients of hidden, weight and bias, each computed in the forward only where it is required;
    the backward multiplies them by the upstream gradient. Under no_grad there is the forward alone. A chunk is of as
    many tokens as memory_budget allows. Where several chunks add to a bf16 weight gradient, its fp32 sums, 4 V D bytes,
    come on top; one chunk of all tokens may take as much instead. The gradients of fp16 tensors are kept in fp32 until
    the backward has multiplied them, by a loss scale for one, and those of fp16 logits are lifted by a power of two
    meanwhile: neither underflows in between.

    One pass, 6 N D V flops, holds for every objective whose coefficient depends on no later token (statistics of a
    token, prefixes with flow "local", on-policy); for the others, and kl_ratio "span_mean", chunks end with sequences.
    Where a sequence does not fit into a chunk, or fewer than 64 tokens do, the gradients need a second pass, 8 N D V
    flops, and so do those of objectives with a form (tokenrl/objectives/forms/base.py), where not all logits fit:
    metrics.passes says which.

    A frozen head (weight and bias require no gradient, as under LoRA) takes one pass there too, 4 N D V flops as
    anywhere, unless there is an entropy term, whose second pass of 6 it takes; beside the budget it may hold [N, D]
    numbers in fp32, which become hidden's gradient where that is in fp32 itself.

    On a CPU with a small D the sums over the vocabulary outweigh the GEMMs, one pass saves a quarter at most, and
    chunks that leave the cache may lose that: at V = 50000, D = 256 it took 1.1 of the time of linear_token_logprobs
    and policy_loss, with memory_budget=32 << 20 0.8 of it.

    Tokens that the mask leaves out enter no GEMM and may hold anything; nor do sequences whose advantages are all zero
    where no other term wants them (metrics.left_out counts their tokens, the other metrics do not). Tokens whose
    coefficient is zero enter no GEMM of the backward. Differentiating twice raises.

    Args:
        objective: as for policy_loss.
        hidden: [B, T, D], or packed [N, D] with cu_seqlens; dtypes as for linear_token_logprobs.
        weight: the head's, [V, D].
        ids: integers [B, T] or [N], aligned with hidden (never shifted here).
        old_logp: as for policy_loss; None: on_policy.
        advantages: as for policy_loss.
        bias: [V].
        temperature: as for token_logprobs.
        softcap: as for token_logprobs.
        logit_scale: as for token_logprobs.
        keep_mask: as for linear_token_logprobs.
        mask: as for policy_loss.
        cu_seqlens: as for policy_loss.
        advantages_per: as for policy_loss.
        segment_ids: as for policy_loss.
        group_ids: as for policy_loss.
        rollout_logp: as for policy_loss; it needs old_logp.
        correction: as for policy_loss.
        token_weight: as for policy_loss.
        aggregation: as for policy_loss.
        normalizer: as for policy_loss.
        ref_logp: log-probs of the reference model, of the shape of ids.
        kl: as for policy_loss.
        kl_coef: as for policy_loss.
        kl_weight: as for policy_loss.
        kl_ratio: as for policy_loss.
        entropy_coef: as for policy_loss.
        entropy_weight: as for policy_loss.
        ignore_index: an id of it takes a token out like the mask does.
        compute_dtype: as for linear_token_logprobs.
        memory_budget: bytes of logits; None: 256 MiB on a CPU, 1 GiB on a GPU.
        main_grad: as for linear_token_logprobs, fp32 [V, D].
        on_policy: old_logp is the current policy's own and is not read.
        without_advantage: "skip", or "compute" for the metrics of sequences that have none.
        vocab: as for linear_token_logprobs: weight, bias, keep_mask and main_grad are this rank's rows of the head, all
            else is the same on all ranks, hidden too unless the VocabShard says sequence_parallel; so are loss and
            metrics. One exchange a chunk, 16 bytes a token, while the logits of the next chunk are made (each takes
            half of memory_budget then); the ranks' shares of hidden's gradient are summed in the forward, a chunk at a
            time, and the backward has no collective.
        context: as for policy_loss: hidden is [n, D] of this rank's tokens, all else of the whole batch, weight's
            gradient the own tokens' share. The log-probs of all tokens are needed before a coefficient is known:
            linear_token_logprobs makes them, 8 N D V flops unless the own logits fit into memory_budget. Beside
            vocab without its sequence_parallel.
        reduce_hidden_grad: False leaves that sum to the caller.
        check: as for token_logprobs.
        backend: as for policy_loss.

    Returns:
        (loss 0-d, LinearMetrics); metrics.logp and metrics.token_entropy are the log-probs and entropies that were
            made, of the shape of ids, without gradient, 0 where none was.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    on_ranks = ranks_of(vocab, context)
    with ExitStack() as checks:
        agreements = [checks.enter_context(x.agreement("linear_policy_loss", hidden, check)) for x in on_ranks]
        check_beside_context(vocab, context)
        check_name("without_advantage", without_advantage, ("skip", "compute"))
        row, head = find_objective(objective), (head_arguments if vocab is None else vocab.head_arguments)(
            hidden if context is None else context.hidden_of_batch(hidden), weight, bias, temperature, softcap,
            logit_scale, keep_mask, compute_dtype, memory_budget, main_grad
        )  # fmt: skip
        if context is not None:
            head = dataclasses.replace(head, hidden=as_saved(hidden))
        layout = _layout(head.like, ids, mask, cu_seqlens, ignore_index)
        chosen = backends.choose(backend, hidden.device, row.gate.name)
        check_main_grad_backend(main_grad, chosen)
        dtype = sum_dtype(head.like.dtype)
        old_logp = None if on_policy else old_logp
        old_logp, token_weight = corrected(
            row, layout, old_logp, None, rollout_logp, segment_ids, token_weight, correction, kl_ratio
        )
        regularizers = regularizers_of(
            layout, dtype, ref_logp=ref_logp, kl=kl, kl_coef=kl_coef, kl_weight=kl_weight, kl_ratio=kl_ratio,
            entropy_coef=entropy_coef, entropy_weight=entropy_weight,
        )  # fmt: skip
        inputs = policy_loss_inputs(
            row, layout, dtype, chosen, old_logp=old_logp, advantages=advantages, advantages_per=advantages_per,
            token_weight=token_weight, segment_ids=segment_ids, group_ids=group_ids, aggregation=aggregation,
            normalizer=normalizer, regularizers=regularizers,
        )  # fmt: skip
        valid = layout.valid()
        flat = head.inputs(ids, valid.view(ids.shape), ignore_index)
        if without_advantage == "skip":
            layout = _with_signal(layout, inputs)
        call = chosen, layout, flat, head.main_grad, inputs
        for some, agreed in zip(on_ranks, agreements, strict=True):
            some.agree(agreed, *call)
    loss, raw, *per_token = _computed(call, vocab, context, reduce_hidden_grad)
    left_out = (valid ^ layout.valid()).sum().to(raw.dtype)  # counted in integers
    return loss, LinearMetrics(torch.cat([raw, left_out[None]]), *(x.view(ids.shape) for x in per_token))


def _computed(
    call: tuple[Any, ...], vocab: Vocabulary | None, context: BatchOnRanks | None, reduce_hidden_grad: bool
) -> tuple[Tensor, ...]:
    """The loss, the sums of its metrics, and of each token the log-prob and more: of one process or on ranks."""
    if context is not None:
        return context.linear_policy_loss(vocab, reduce_hidden_grad, *call)
    if vocab is not None:
        return vocab.linear_policy_loss(reduce_hidden_grad, *call)
    return dispatch.linear_policy_loss(*call)


def _layout(like: Tensor, ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, ignore_index: int) -> Layout:
    """Of the ids, those that are ignored left out. like: logits [.., V]."""
    check_ids(like, ids, ())
    if ids.dim() != like.dim() - 1:
        raise wrong("ids", f"shape {list(ids.shape)}", f"one id per token, {list(like.shape[:-1])}")
    layout = layout_of(ids, mask=mask, cu_seqlens=cu_seqlens, name="ids")
    named = ids.reshape(-1) != ignore_index
    return dataclasses.replace(layout, mask=named if layout.mask is None else named & layout.mask)


def _with_signal(layout: Layout, inputs: dispatch.PolicyLossInputs) -> Layout:
    """Without the sequences that have no advantage other than zero, where these add nothing to loss and gradients."""
    gate, advantages = inputs.row.gate, inputs.advantages
    silent = gate.uses_advantages and gate.vanishes and inputs.row.form is None and not inputs.regularizers.wanted
    if advantages is None or not silent:
        return layout
    signal = advantages != 0
    if advantages.numel() == layout.num_tokens:
        some = (layout.valid() & signal).cumsum(0)
        signal = torch.cat([some.new_zeros(1), some])[layout.cu_seqlens].diff() > 0
    return dataclasses.replace(layout, mask=layout.valid() & layout.spread(signal))
