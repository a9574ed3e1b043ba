"""sft_loss, linear_sft_loss, linear_multi_token_loss: weighted cross entropy of given tokens, by row "reinforce"."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_integers, check_number, check_tensor
from ..batch.layout import Layout, layout_of
from ..errors import described, wrong
from ..logprobs.from_logits import IGNORED
from ..objectives.metrics import LinearMetrics, Metrics
from .linear_policy import linear_policy_loss
from .policy import policy_loss


def sft_loss(
    logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Metrics]:
    """sum_t w_t token_weight_t (-logp_t), cross entropy of given tokens: policy_loss("reinforce") with advantages 1.

    Args:
        logp: fp32 or fp64 [B, T], or packed [N] with cu_seqlens; it alone gets a gradient.
        mask: bool, the tokens that pay, such as those of tokenrl.token_selection; masked cells may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        token_weight: of logp's shape, or [B, 1], such as those of tokenrl.sft_weights.
        aggregation: w, as for policy_loss.
        normalizer: as for policy_loss.
        backend: as for policy_loss.

    Returns:
        (loss 0-d, Metrics).
    """
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    return policy_loss(
        "reinforce", logp, None, _ones(layout, logp), mask=mask, cu_seqlens=cu_seqlens, advantages_per="sequence",
        token_weight=token_weight, aggregation=aggregation, normalizer=normalizer, backend=backend,
    )  # fmt: skip


def linear_sft_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weight: Tensor | None = None,
    aggregation: str = "token-mean",
    normalizer: float | Tensor | None = None,
    **head: Any,
) -> tuple[Tensor, LinearMetrics]:
    """sft_loss from hidden states and the head, with its gradients in one pass: 6 n D V flops of n tokens that mask
    keeps, as the others enter no GEMM, forward or backward.

    Args:
        hidden: [B, T, D], or packed [N, D] with cu_seqlens.
        weight: [V, D].
        ids: integers [B, T] or [N], aligned with hidden.
        mask: as for sft_loss, and so are all up to normalizer.
        cu_seqlens: integers [S + 1].
        token_weight: of the shape of ids, or [B, 1].
        aggregation: w, as for policy_loss.
        normalizer: as for policy_loss.
        head: bias, temperature, softcap, logit_scale, keep_mask, ignore_index, compute_dtype, memory_budget, main_grad
            and backend of linear_policy_loss.

    Returns:
        (loss 0-d, LinearMetrics, whose logp are the log-probs).
    """
    check_tensor("ids", ids)
    layout = layout_of(ids, mask=mask, cu_seqlens=cu_seqlens, name="ids")
    return linear_policy_loss(
        "reinforce", hidden, weight, ids, None, _ones(layout, ids), mask=mask, cu_seqlens=cu_seqlens,
        advantages_per="sequence", token_weight=token_weight, aggregation=aggregation, normalizer=normalizer, **head,
    )  # fmt: skip


def linear_multi_token_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    coefs: Sequence[float],
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: Tensor | None = None,
    **head: Any,
) -> tuple[Tensor, LinearMetrics]:
    """sum_i coefs_i CE_i over K streams of hidden states with one head: stream i predicts the token i further.

        CE_i = mean of -log p_i(ids_{t+i} | t) over the t whose token t + i is in the same sequence and in the mask

    Args:
        hidden: [K, B, T, D], or packed [K, N, D] with cu_seqlens: of the model itself and of its K - 1 heads for later
            tokens.
        weight: [V, D], of all streams.
        ids: integers [B, T] or [N], aligned with stream 0.
        coefs: K numbers, such as those of sft_weights.caft_coefs; a stream whose coefficient is 0 enters no GEMM.
        mask: bool, of ids' shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        normalizer: [K], what each stream's sum is divided by instead of its own count.
        head: as for linear_sft_loss.

    Returns:
        (loss 0-d, LinearMetrics of all streams, whose logp is [K, ..], 0 where there is no token).

    Source: CAFT's code (authors' code).
    """
    layout = layout_of(ids, mask=mask, cu_seqlens=cu_seqlens, name="ids")
    check_integers("ids", ids)
    check_tensor("hidden", hidden)
    if not isinstance(coefs, Sequence) or len(coefs) == 0:
        raise wrong("coefs", described(coefs), "numbers, one per stream of hidden")
    if hidden.shape[1:-1] != ids.shape or len(coefs) != len(hidden):
        accepted = f"[{len(coefs)}, {', '.join(map(str, ids.shape))}, D], a stream per coefficient"
        raise wrong("hidden", described(hidden), accepted)
    for coef in coefs:
        check_number("coefs", coef)
    ahead = [_ahead(ids.reshape(-1), layout, i) for i in range(len(coefs))]
    targets, counted = (torch.stack(x) for x in zip(*ahead, strict=True))
    share = torch.as_tensor(list(coefs), dtype=torch.float64, device=ids.device)
    counted = counted & (share != 0)[:, None] & (targets != head.get("ignore_index", IGNORED))
    share = share / _counts(normalizer, counted)
    tokens = targets.numel()
    loss, metrics = linear_sft_loss(
        hidden.reshape(tokens, hidden.shape[-1]), weight, targets.reshape(-1), mask=counted.reshape(-1),
        cu_seqlens=torch.tensor([0, tokens], device=ids.device), aggregation="token-sum",
        token_weight=share[:, None].expand_as(counted).reshape(-1), **head,
    )  # fmt: skip
    shape = hidden.shape[:-1]
    return loss, LinearMetrics(metrics.raw, metrics.logp.view(shape), metrics.token_entropy.view(shape))


def _ones(layout: Layout, like: Tensor) -> Tensor:
    return torch.ones(layout.num_sequences, dtype=torch.float32, device=like.device)


def _ahead(ids: Tensor, layout: Layout, distance: int) -> tuple[Tensor, Tensor]:
    """(the ids [N] that come `distance` later, bool [N]: whether there is one that counts in the same sequence)."""
    if distance == 0:
        return ids, layout.valid()
    past, rows = min(distance, ids.numel()), layout.rows()
    counted = layout.valid()[distance:] & (rows[distance:] == rows[:-distance])
    ends = counted.new_zeros(past)
    return torch.cat([ids[distance:], ids.new_zeros(past)]), torch.cat([counted, ends])


def _counts(normalizer: Tensor | None, counted: Tensor) -> Tensor:
    """fp64 [K]."""
    if normalizer is None:
        return counted.sum(1).clamp(min=1).double()
    check_constant("normalizer", normalizer)
    if normalizer.shape != counted.shape[:1] or normalizer.device != counted.device:
        given = f"{list(normalizer.shape)} on {normalizer.device}"
        raise wrong("normalizer", given, f"a count per stream, [{len(counted)}] on {counted.device}")
    return torch.where(normalizer > 0, normalizer, 1).double()
