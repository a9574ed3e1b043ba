"""linear_preference_loss: preference_loss from hidden states and the head, without the logits."""

import dataclasses
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..batch.checks import check_constant
from ..batch.layout import Layout, layout_of
from ..errors import renamed, wrong
from ..logprobs.from_hidden import HeadArguments, check_main_grad_backend
from ..logprobs.from_logits import IGNORED, check_ids
from ..logprobs.vocabulary import Vocabulary
from ..objectives.preference import Preference, preference
from ..observed import observed
from ..ops import backends
from ..ops.linear.gemm import sum_dtype
from ..ops.preference_dispatch import of_logp_by
from .policy_arguments import BatchOnRanks, check_beside_context, ranks_of
from .preference_arguments import check_needed, check_used, preference_inputs
from .preference_from_hidden import Call, LinearPreferenceMetrics, Place, Tensors


@observed
def linear_preference_loss(
    objective: str | Preference,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    ref_logp: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    pairs: Tensor | None = None,
    desirable: Tensor | None = None,
    kl: float | Tensor | None = None,
    reward_shift: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence_weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    nll_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    ignore_index: int = IGNORED,
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    main_grad: Tensor | None = None,
    vocab: Vocabulary | None = None,
    context: BatchOnRanks | None = None,
    reduce_hidden_grad: bool = True,
    check: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, LinearPreferenceMetrics]:
    """preference_loss of the log-probs of linear_token_logprobs, with its gradients, in one pass over chunks of tokens.

    The reference gets no gradient: a tensor of it that requires grad raises. Rows with a divergence, KL of the
    reference to the policy, need ref_hidden and make that here too.

    The loss carries the gradients of hidden, weight, bias, token_weight and divergence_weight, each computed in the
    forward only where it is required; the backward multiplies them by the upstream gradient. Chunks are of whole pairs,
    as many as memory_budget allows: 6 N D V flops, and 2 N D' V of a reference. Where a pair does not fit into one, and
    where a row sorts the batch that does not fit as a whole, the gradients need a second pass, 8 N D V, and 4 N D' V
    beside a divergence: metrics.passes says which. So it is without a divergence where fewer than 64 tokens fit into a
    chunk, and under torch.func and in a trace by torch.compile, where a divergence takes those of
    linear_token_divergence on top.

    Tokens that the masks leave out, and sequences in no pair, enter no GEMM and may hold anything; tokens whose
    coefficient is zero enter none of the backward where there is no divergence. Differentiating twice raises, but for
    backend="reference".

    Args:
        objective: as for preference_loss.
        hidden: [B, T, D], or packed [N, D] with cu_seqlens.
        weight: [V, D], as for linear_token_logprobs.
        ids: integers [B, T] or [N], aligned with hidden (never shifted here).
        ref_logp: fp32 or fp64 of the shape of ids; or ref_hidden.
        bias: [V].
        ref_hidden: [B, T, D'] or [N, D'], of which ref_logp is made here, with the options and dtype of the trained
            head.
        ref_weight: [V, D']; None: weight and bias, then frozen (an adapter's base model).
        ref_bias: [V].
        temperature: as for linear_token_logprobs, and so are all up to keep_mask.
        softcap: None for none.
        logit_scale: a number.
        keep_mask: bool [V], or of each row.
        mask: as for preference_loss, and so are all up to nll_normalizer.
        cu_seqlens: integers [S + 1].
        pairs: integers [P, 2].
        desirable: bool [S].
        kl: a number, 0-d, or [K].
        reward_shift: likewise.
        token_weight: of the shape of ids.
        divergence_weight: likewise.
        pair_weight: [P] or [S].
        nll_mask: bool of the shape of ids.
        normalizer: in place of P.
        nll_normalizer: in place of the tokens of the nll term.
        ignore_index: an id that takes its token out like the masks do.
        compute_dtype: as for linear_token_logprobs.
        memory_budget: bytes of the chunks, as for linear_policy_loss.
        main_grad: as for linear_token_logprobs, which the weight's gradient is added to by each backward.
        vocab: as for linear_policy_loss: weight, bias, keep_mask, main_grad and those of the reference are this rank's
            rows of the heads. One exchange a chunk, 16 bytes a token, beside a divergence two; the ranks' shares of
            hidden's gradient are summed in the forward; where linear_token_logprobs stands in, its own exchanges.
        context: as for linear_policy_loss: hidden and ref_hidden are [n, D] of this rank's tokens, without chunks of
            pairs, 8 N D V flops unless the own logits fit into memory_budget.
        reduce_hidden_grad: False leaves that sum to the caller.
        check: as for policy_loss.
        backend: as for linear_token_logprobs; what it has no kernel of once there are log-probs is the reference's.

    Returns:
        (loss 0-d, LinearPreferenceMetrics).
    """
    how: dict[str, Any] = {
        "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "keep_mask": keep_mask,
        "compute_dtype": compute_dtype, "memory_budget": memory_budget,
    }  # fmt: skip
    on_ranks = ranks_of(vocab, context)
    with ExitStack() as checks:
        agreements = [checks.enter_context(x.agreement("linear_preference_loss", hidden, check)) for x in on_ranks]
        check_beside_context(vocab, context)
        row, place = preference(objective), Place(vocab, context, reduce_hidden_grad, check)
        head = place.head_of(hidden, weight, bias, **how, main_grad=main_grad)
        chosen = backends.choose(backend, hidden.device)
        check_main_grad_backend(main_grad, chosen)
        how["compute_dtype"] = head.like.dtype  # said to have been chosen, once
        layout = _layout(head.like, ids, mask, cu_seqlens)
        named = ids.reshape(-1) != ignore_index
        layout = dataclasses.replace(layout, mask=named if layout.mask is None else named & layout.mask)
        reference = _reference(row, (weight, bias), ref_logp, ref_hidden, ref_weight, ref_bias, how, head, place)
        if reference is not None:  # made below, from hidden states
            ref_logp = ids.new_zeros(ids.shape, dtype=sum_dtype(head.like.dtype))
        inputs = preference_inputs(
            row, layout, ref_logp=ref_logp, pairs=pairs, desirable=desirable, kl=kl, reward_shift=reward_shift,
            token_weight=token_weight, divergence_weight=divergence_weight, pair_weight=pair_weight,
            nll_mask=_named(nll_mask, named, layout), normalizer=normalizer, nll_normalizer=nll_normalizer,
        )  # fmt: skip
        for some, agreed in zip(on_ranks, agreements, strict=True):
            flat = head.inputs(ids, layout.valid().view(ids.shape), ignore_index)
            ref_width = None if reference is None else reference[0].shape[-1]
            some.agree_on_preference(agreed, layout, flat, inputs, ref_width)
    links = of_logp_by(chosen, inputs)
    call = Call((hidden, weight, bias), reference, ids, ignore_index, how, backend, links, place)
    return call.loss(inputs, head, chosen)


def _layout(like: Tensor, ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Layout:
    check_ids(like, ids, ())
    if ids.dim() != like.dim() - 1:
        raise wrong("ids", f"shape {list(ids.shape)}", f"one id per token, {list(like.shape[:-1])}")
    return layout_of(ids, mask=mask, cu_seqlens=cu_seqlens, name="ids")


def _reference(
    row: Preference, own: tuple[Tensor, Tensor | None], ref_logp: Tensor | None, hidden: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, how: dict[str, Any], head: HeadArguments, place: "Place",
) -> Tensors | None:  # fmt: skip
    """The reference's hidden states, weight and bias, checked; None where its log-probs are given, or none wanted."""
    if hidden is None:
        for name, x in (("ref_weight", weight), ("ref_bias", bias)):
            if x is not None:
                raise wrong(name, "one", "None without ref_hidden")
        check_needed(row, "ref_hidden", None, row.divergence > 0)
        return None
    check_used(row, "ref_hidden", hidden, row.reference == "given")
    if ref_logp is not None:
        raise wrong("ref_logp", "one", "None beside ref_hidden, of which it is made")
    weight, bias = (weight, bias) if weight is not None else _shared(own, bias)
    other = renamed("ref", place.head_of, hidden, weight, bias, *how.values(), None)
    for name, x in (("ref_hidden", hidden), ("ref_weight", weight), ("ref_bias", bias)):
        if x is not None:
            check_constant(name, x)
    if other.like.shape != head.like.shape:
        shapes = f"a head of logits {list(other.like.shape)}", f"those of the trained one, {list(head.like.shape)}"
        raise wrong("ref_hidden", *shapes)
    return hidden, weight, bias


def _shared(own: tuple[Tensor, Tensor | None], ref_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head of policy and reference."""
    if ref_bias is not None:
        raise wrong("ref_bias", "one", "None without ref_weight: the policy's weight comes with its own")
    if any(x is not None and x.requires_grad for x in own):
        raise wrong("ref_weight", None, "the reference's, as weight is trained (weight.detach() for its value now)")
    return own


def _named(nll_mask: Tensor | None, named: Tensor, layout: Layout) -> Tensor | None:
    """Without ids to ignore; what is no mask is left to the checks."""
    if not isinstance(nll_mask, Tensor) or nll_mask.dtype != torch.bool:
        return nll_mask
    fits = nll_mask.shape == layout.shape and nll_mask.device == named.device
    return nll_mask & named.view(layout.shape) if fits else nll_mask
