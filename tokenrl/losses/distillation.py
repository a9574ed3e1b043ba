"""distillation_loss, linear_ and topk_distillation_loss: a row of the table of distillation objectives on a batch."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..batch.checks import check_tensor
from ..batch.layout import Layout, layout_of
from ..errors import wrong
from ..logprobs.divergence import head_pair, of_head_pair, token_divergence
from ..logprobs.from_logits import as_transform
from ..logprobs.topk import topk_token_divergence
from ..logprobs.vocabulary import Vocabulary, agreement
from ..objectives.distillation import Distillation, distillation
from ..observed import observed
from ..ops import backends
from ..ops.kernel_ops import Transform
from ..ops.linear.gemm import sum_dtype, weighed_sum
from .aggregation import span_weights
from .regularizers import flat_weight

Temperature = float | Tensor


@observed
def distillation_loss(
    objective: str | Distillation,
    logits: Tensor,
    other_logits: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: Tensor | None = None,
    aggregation: str | None = None,
    normalizer: float | Tensor | None = None,
    temperature: Temperature = 1.0,
    backend: str | None = None,
    **heads: Any,
) -> tuple[Tensor, Tensor]:
    """The loss of a student on a teacher's distributions.

        loss = sum_t w_t T_t^power D(p_t, r_t),   p = softmax(logits / T),   r = softmax(other_logits / T)

    Args:
        objective: a name in tokenrl.DISTILLATIONS, or what tokenrl.distillation(name, ...) returns.
        logits: the student's, [B, T, V], or packed [N, V] with cu_seqlens [S + 1].
        other_logits: the teacher's, of the same shape. They get a gradient where they require one.
        mask: bool of the tokens that pay; masked rows may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        token_weight: of the tokens, or [B, 1].
        aggregation: as for policy_loss; None takes the objective's own.
        normalizer: as for policy_loss.
        temperature: of both, a number or one per token.
        backend: as for policy_loss.
        heads: other_temperature, softcap, logit_scale, keep_mask, the other_*, vocab and check of token_divergence.
            Beside vocab mask, token_weight and the result are the same on all ranks.

    Returns:
        (loss 0-d, the divergences of the tokens, of the shape of mask, without gradient, 0 where masked).

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    row, layout, weights = weighed_tokens(
        objective, "logits", logits, None, mask, cu_seqlens, token_weight, aggregation, normalizer, temperature, backend
    )
    values = token_divergence(
        logits, other_logits, row.divergence, temperature=temperature, row_mask=layout.valid().view(layout.shape),
        backend=backend, **heads,
    )  # fmt: skip
    assert isinstance(values, Tensor)
    return weighed_sum(weights.view(values.shape), values), values.detach()


@observed
def linear_distillation_loss(
    objective: str | Distillation,
    hidden: Tensor,
    weight: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    *,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: Tensor | None = None,
    aggregation: str | None = None,
    normalizer: float | Tensor | None = None,
    temperature: Temperature = 1.0,
    other_temperature: Temperature | None = None,
    softcap: float | None = None,
    other_softcap: float | None = None,
    logit_scale: float = 1.0,
    other_logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    other_keep_mask: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    vocab: Vocabulary | None = None,
    reduce_hidden_grad: bool = True,
    check: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """distillation_loss from hidden states and both heads, with its gradients, in one pass over chunks of tokens.

        loss = sum_t w_t T_t^power D(p_t, r_t),   logits = hidden @ weight^T + bias, other_logits likewise

    Tokens that are masked or weigh nothing enter no GEMM. The loss carries the gradients of hidden, weight and bias:
    the forward makes them, 6 N D V and 2 N D' V flops, the backward multiplies.

    Args:
        objective: as for distillation_loss.
        hidden: the student's, [B, T, D], or packed [N, D] with cu_seqlens.
        weight: [V, D].
        other_hidden: the teacher's, [B, T, D'] or [N, D']. It is frozen: a tensor of it that requires grad raises.
        other_weight: [V, D'].
        bias: [V].
        other_bias: [V].
        mask: bool of the tokens that pay; masked rows may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        token_weight: of the tokens, or [B, 1].
        aggregation: as for policy_loss, without groups; None takes the objective's own.
        normalizer: as for policy_loss.
        temperature: of both, a number or one per token.
        other_temperature: the teacher's; None: the temperature.
        softcap: as for linear_token_divergence, and so are all up to memory_budget.
        other_softcap: the teacher's.
        logit_scale: a number.
        other_logit_scale: the teacher's.
        keep_mask: bool [V], or of each row.
        other_keep_mask: the teacher's.
        compute_dtype: of the GEMMs of both heads.
        memory_budget: bytes of the chunks.
        vocab: as for linear_token_divergence; mask, token_weight and all else of tokens are of all of them, the same on
            all ranks, and so is the loss. The forward sums hidden's gradient too: the backward has no collective.
        reduce_hidden_grad: as for linear_token_divergence.
        check: as for token_logprobs.
        backend: as for policy_loss.

    Returns:
        As distillation_loss.
    """
    with agreement(vocab, "linear_distillation_loss", hidden, check) as agreed:
        of_all = hidden if vocab is None else hidden.new_empty(()).expand(*vocab.rows_of(hidden), 1)
        row, layout, weights = weighed_tokens(
            objective, "hidden", of_all, compute_dtype, mask, cu_seqlens, token_weight, aggregation, normalizer,
            temperature, backend,
        )  # fmt: skip
        pays = layout.valid() & (weights != 0)
        heads = head_pair(
            (hidden, weight, bias, temperature, softcap, logit_scale, keep_mask),
            (other_hidden, other_weight, other_bias, temperature if other_temperature is None else other_temperature,
             other_softcap, other_logit_scale, other_keep_mask),
            pays.view(layout.shape), compute_dtype, memory_budget, vocab,
        )  # fmt: skip
        chosen = backends.choose(backend, hidden.device)
        if vocab is not None:
            vocab.agree_on_divergence(agreed, *heads, row.divergence, True)
    loss, values = of_head_pair(vocab, hidden, reduce_hidden_grad, chosen, *heads, row.divergence, weights)
    return loss, values.view(layout.shape)


@observed
def topk_distillation_loss(
    objective: str | Distillation,
    logp_topk: Tensor,
    other_logp_topk: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: Tensor | None = None,
    aggregation: str | None = None,
    normalizer: float | Tensor | None = None,
    temperature: Temperature = 1.0,
    **lists: Any,
) -> tuple[Tensor, Tensor]:
    """distillation_loss over K ids of each token instead of the vocabulary, as a teacher's server gives them.

        loss = sum_t w_t T_t^power D(p_t, r_t),   D by topk_token_divergence

    verl with use_policy_gradient takes the values of the result, their sign turned, as advantages of policy_loss. For
    lists,

        rest="tail"                                             TRL's IW-OPD with loss_add_tail, SDPO with its tail
        rest="renormalised"                                     ms-swift, NeMo-RL, TRL without a tail
        rest="truncated", logp_floor=-10, limits=(0, 10)        verl's forward_kl_topk

    Args:
        objective: as for distillation_loss.
        logp_topk: fp32 or fp64 [B, T, K], or packed [N, K] with cu_seqlens: the student's log-probs of some ids, by
            token_logprobs or linear_token_logprobs.
        other_logp_topk: of that shape, the teacher's of the same ids, as they came.
        mask: bool of the tokens that pay; masked rows may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        token_weight: of the tokens, or [B, 1].
        aggregation: as for policy_loss, without groups; None takes the objective's own.
        normalizer: as for policy_loss.
        temperature: at which both were made, for the row's T^power alone.
        lists: rest, topk_mask, entropy, limits, tail_floor, logp_floor, outside_logp of topk_token_divergence.

    Returns:
        As distillation_loss.

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    row, layout, weights = weighed_tokens(
        objective, "logp_topk", logp_topk, None, mask, cu_seqlens, token_weight, aggregation, normalizer, temperature,
        None,
    )  # fmt: skip
    values = topk_token_divergence(
        logp_topk, other_logp_topk, row.divergence, row_mask=layout.valid().view(layout.shape), **lists
    )
    return weighed_sum(weights.view(values.shape), values), values.detach()


def weighed_tokens(
    objective: str | Distillation, name: str, x: Tensor, compute_dtype: torch.dtype | None, mask: Tensor | None,
    cu_seqlens: Tensor | None, token_weight: Tensor | None, aggregation: str | None, normalizer: float | Tensor | None,
    temperature: Temperature, backend: str | None,
) -> tuple[Distillation, Layout, Tensor]:  # fmt: skip
    """(the row, where the tokens of x lie, their w_t T_t^power [N], 0 in masked cells). x: of the argument `name`,
    [B, T, .] or [N, .]."""
    row = distillation(objective)
    check_tensor(name, x)
    layout = layout_of(x[..., 0], mask=mask, cu_seqlens=cu_seqlens, name=f"a row per token of {name}")
    transform = as_transform(temperature, None, 1.0, None, x[..., :1])
    dtype = sum_dtype(compute_dtype or x.dtype)
    return row, layout, _weights(row, layout, dtype, transform, token_weight, aggregation, normalizer, backend)


def _weights(
    row: Distillation, layout: Layout, dtype: torch.dtype, transform: Transform, token_weight: Tensor | None,
    aggregation: str | None, normalizer: float | Tensor | None, backend: str | None,
) -> Tensor:  # fmt: skip
    chosen = backends.choose(backend, layout.cu_seqlens.device)
    mode = aggregation or row.aggregation
    if mode in ("group-mean", "balanced"):
        raise wrong("aggregation", repr(mode), "a mode without groups; their weights go to token_weight")
    found = span_weights(mode, layout, advantages=None, group_ids=None, normalizer=normalizer, backend=chosen)
    share = torch.where(found.span_weight == 0, 0, found.span_weight / found.normalizer)
    weights = layout.per_token(share, share.to(dtype))
    if token_weight is not None:
        factor = flat_weight("token_weight", token_weight, layout, dtype)
        weights = torch.where(layout.valid() & (weights != 0), weights * factor, 0)
    if row.power == 0:
        return weights
    if transform.temperatures is None:
        return weights * transform.temperature**row.power
    factor = dataclasses.replace(layout, mask=None).per_token(transform.temperatures.reshape(-1), weights)
    return torch.where(weights != 0, weights * factor**row.power, 0)
