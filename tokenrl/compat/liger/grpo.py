"""Liger's GRPO from logits and from hidden states."""

from typing import Any

import torch
from torch import Tensor

from ...batch.checks import check_tensor
from ...errors import wrong
from ...logprobs.from_hidden import head_dtype, linear_token_logprobs
from ...logprobs.from_logits import IGNORED, token_logprobs
from ...losses.linear_policy import linear_policy_loss
from ...losses.policy import policy_loss
from ..grpo import VESPO
from ..stats import may_be_in_place
from .settings import Settings, mask_of, ratio_of, wide


def _log_probs(
    logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, name: str, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """(log-probs of ids under all logits but the last of each row, their mask), [B, L]."""
    check_tensor("logits", logits)
    check_tensor(name, ids)
    if logits.dim() != 3 or ids.shape != (logits.shape[0], logits.shape[1] - 1):
        raise wrong(name, f"shape {list(ids.shape)}", f"[B, L] for logits [B, L + 1, V], {list(logits.shape)}")
    mask = mask_of("completion_mask", mask, ids)
    ids = torch.nn.functional.pad(ids.masked_fill(~mask, IGNORED), (0, 1), value=IGNORED)
    inplace = inplace and may_be_in_place(logits)
    found = token_logprobs(logits, ids, temperature=temperature, outputs=("logp",), inplace_backward=inplace)
    return found.logp[:, :-1], mask


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """Liger: the log-probs [B, L] of the last L input_ids under logits [B, L + 1, V], without gradient; 0 where mask,
    of the shape of input_ids, is."""
    length = logits.shape[1] - 1
    mask = None if mask is None else mask[:, -length:]
    return _log_probs(logits, input_ids[:, -length:], mask, temperature, "input_ids")[0]


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Any, ...]:
    """Liger: GRPO's loss from logits [B, L + 1, V], whose last position is not read, and completion_ids [B, L].

    reduce: (loss 0-d, [mean KL where beta is not 0, share of clipped tokens]); else (losses, KL estimates or None,
    1 where clipped), each [B, L] and 0 where completion_mask is; the losses carry gradients, per token.
    old_logp, ref_logp [B, L]; advantages [B]; vllm_is_ratio [B, L], [B, 1] or [B]. inplace permits the gradient to lie
    in the memory of the logits; it is used where autograd cannot notice (tokenrl.compat.logprobs_from_logits).
    loss_type "luspo" reduced has Liger's value, and its gradient (Liger's backward reads out of bounds).
    Errors: ValueError naming the argument.
    """
    settings = Settings(
        loss_type, importance_sampling_level, beta, eps_low, eps_high, delta,
        (sapo_temperature_pos, sapo_temperature_neg),
        dict(zip(VESPO, (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg), strict=True)),
        use_bias_correction_kl, max_completion_length,
    )  # fmt: skip
    logp, mask = _log_probs(logits, completion_ids, completion_mask, temperature, "completion_ids", inplace)
    if beta != 0 and ref_logp is None:
        raise wrong("ref_logp", None, f"log-probs of the reference model, {list(mask.shape)}; beta is {beta}")
    old, ref, ratio = wide(old_logp), wide(ref_logp) if beta != 0 else None, ratio_of(vllm_is_ratio, mask)
    _check_advantages(advantages, mask)
    if not reduce:
        losses, kl, clipped = settings.per_token(logp, old, ref, advantages, mask, ratio)
        return losses, None if ref is None else kl, clipped
    old = logp.detach() if old is None else old
    loss, _ = policy_loss(
        settings.row, logp, **settings.policy_inputs(old, ref, advantages, mask, ratio, num_items_in_batch)
    )
    return loss, _metrics(settings, logp, old, ref, advantages, mask)


def _check_advantages(advantages: Tensor, mask: Tensor) -> None:
    check_tensor("advantages", advantages)
    if advantages.shape != mask.shape[:1]:
        raise wrong("advantages", f"shape {list(advantages.shape)}", f"[{len(mask)}], one per sequence")


@torch.no_grad()
def _metrics(
    settings: Settings, logp: Tensor, old: Tensor | None, ref: Tensor | None, advantages: Tensor, mask: Tensor
) -> list[Tensor]:
    """Means over the tokens: of the KL estimates where beta is not 0, and of what is clipped."""
    _, kl, clipped = settings.per_token(logp.detach(), old, ref, advantages, mask, None)
    count = mask.sum().clamp(min=1)
    return [x.sum() / count for x in ((kl, clipped) if settings.beta != 0 else (clipped,))]


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """Liger: GRPO's loss from hidden states by linear_policy_loss, in one pass where the objective allows it.

    forward(_input [B, T, D], lin_weight [V, D], selected_token_ids [B, T], attention_mask [B, T], advantages [B], ...)
    returns (loss 0-d, (mean KL where beta is not 0, share of clipped tokens)). ref_per_token_logps, else ref_input with
    ref_weight and ref_bias, is the reference where use_ref_model says that there is one; without it the KL is 0. Under
    autocast the head computes in its dtype. compiled and chunk_size have no effect.
    Errors: ValueError naming the argument; so for loss_type "luspo", under which Liger sums masked tokens too.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        if loss_type == "luspo":
            raise wrong("loss_type", "'luspo'", "triton_grpo_loss's, or tokenrl.linear_policy_loss('luspo', ...)")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise wrong("max_completion_length", None, "a number of tokens, with loss_type 'dr_grpo'")
        self.settings = Settings(
            loss_type, importance_sampling_level, beta, epsilon_low, epsilon_high, delta,
            (sapo_temperature_pos, sapo_temperature_neg),
            dict(zip(VESPO, (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg), strict=True)),
            use_bias_correction_kl, max_completion_length,
        )  # fmt: skip
        self.use_ref_model, self.temperature = use_ref_model, temperature

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        mask = mask_of("attention_mask", attention_mask, selected_token_ids)
        ratio, ref, old = ratio_of(vllm_is_ratio, mask), None, wide(old_per_token_logps)
        _check_advantages(advantages, mask)
        if self.settings.beta != 0 and self.use_ref_model:
            ref = wide(ref_per_token_logps)
            ref = self._reference(ref_input, ref_weight, ref_bias, selected_token_ids, mask) if ref is None else ref
        loss, found = linear_policy_loss(
            self.settings.row, _input, lin_weight, selected_token_ids, bias=bias, temperature=self.temperature,
            compute_dtype=head_dtype(_input), without_advantage="compute",
            **self.settings.policy_inputs(old, ref, advantages, mask, ratio, num_items_in_batch),
        )  # fmt: skip
        return loss, tuple(_metrics(self.settings, found.logp, old, ref, advantages, mask))

    @torch.no_grad()
    def _reference(
        self, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, ids: Tensor, mask: Tensor
    ) -> Tensor:
        if hidden is None or weight is None:
            raise wrong("ref_per_token_logps", None, "log-probs, or ref_input and ref_weight, with use_ref_model")
        return linear_token_logprobs(
            hidden, weight, ids, bias=bias, temperature=self.temperature, row_mask=mask, outputs=("logp",),
            compute_dtype=head_dtype(hidden),
        ).logp  # fmt: skip
