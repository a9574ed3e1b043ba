"""The loss of TRL's GRPOTrainer, setting by setting, in tokenrl's terms; the same in trl 1.10 to 1.16."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...compat.grpo import LEAST, LEVELS, MOST, VESPO, grpo_objective
from ...losses.aggregation import aggregation_weights
from ...losses.policy import policy_loss
from ...losses.rollout_correction import off_policy_sequence_mask
from ...losses.token_metrics import token_metrics
from ...objectives.policy import Objective, objective

UNCLIPPED = objective("ratio", clamp=math.inf)
QUARTERS = 4


@dataclass(frozen=True)
class MicroBatch:
    """One call of _compute_loss. inputs: TRL's; logp, entropy [B, T]; mask: bool [B, T], tools' output left out;
    auxiliary: the balance loss of a mixture of experts, or None."""

    inputs: dict[str, Any]
    logp: Tensor
    entropy: Tensor
    auxiliary: Tensor | None
    mask: Tensor

    @property
    def sampled(self) -> Tensor:
        """The log-probs at the time of the rollout; TRL leaves them out where they are the current ones."""
        old = self.inputs.get("old_per_token_logps")
        return self.logp.detach() if old is None else old


def parts_of(trainer: Any) -> int:
    """The micro-batches of an optimizer step, which share one loss."""
    return trainer.current_gradient_accumulation_steps if trainer.model.training else 1


def host_objective(trainer: Any) -> Objective:
    """TRL's loss_type with its parameters as a row."""
    args = trainer.args
    vespo = {name: getattr(args, f"vespo_{name}") for name in VESPO}
    return grpo_objective(
        trainer.loss_type, trainer.importance_sampling_level, trainer.epsilon_low, trainer.epsilon_high, args.delta,
        (args.sapo_temperature_pos, args.sapo_temperature_neg), vespo,
    )  # fmt: skip


def share_of_items(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """The tokens that the loss of one micro-batch is divided by, of those of all processes and steps."""
    items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return items * parts_of(trainer) / trainer.args.steps_per_generation if trainer.model.training else items


def weighting(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """mask, aggregation and normalizer of TRL's loss_type."""
    rows, parts = mask.shape[0], parts_of(trainer)
    modes: dict[str, tuple[str, Any]] = {
        "grpo": ("seq-mean-token-mean", rows * parts),
        "sapo": ("seq-mean-token-mean", rows * parts),
        "luspo": ("seq-mean-token-sum", rows * parts),
        "dr_grpo": ("token-sum", rows * parts * trainer.max_completion_length),
    }
    if trainer.loss_type == "bnpo":
        aggregation, normalizer = "token-mean", mask.sum().clamp(min=1) * parts
    elif trainer.loss_type in modes:
        aggregation, normalizer = modes[trainer.loss_type]
    else:
        aggregation, normalizer = "token-sum", share_of_items(trainer, inputs)
    return {"mask": mask, "aggregation": aggregation, "normalizer": normalizer}


def high_entropy(trainer: Any, batch: MicroBatch) -> Tensor | None:
    """bool [B, T]: the tokens of top_entropy_quantile, None for all; TRL's own, which asks all processes."""
    if trainer.top_entropy_quantile >= 1.0:
        return None
    return trainer.get_high_entropy_mask(batch.entropy, batch.mask, 1 - trainer.top_entropy_quantile)


def corrects_rollout(trainer: Any) -> bool:
    return trainer.use_vllm and trainer.vllm_importance_sampling_correction


def ratio_holds_rollout(trainer: Any, row: Objective) -> bool:
    """Whether old_logp is no longer that of the ratio which TRL corrects its KL with."""
    return row.gate.reads_rollout and corrects_rollout(trainer)


def policy_inputs(trainer: Any, inputs: dict[str, Any], row: Objective) -> dict[str, Any]:
    """old_logp [B, T] (None: the current log-probs), advantages [B] or [B, T], token_weight [B, T] or [B, 1]: vLLM's
    importance ratio, which some rows take into theirs."""
    old = inputs.get("old_per_token_logps")
    weight = inputs["importance_sampling_ratio"] if corrects_rollout(trainer) else None
    if weight is not None and row.gate.reads_rollout:
        old, weight = old - weight.log().clamp(LEAST, MOST), None
    advantages = inputs["advantages"]
    if advantages.dim() == 2 and advantages.shape[1] == 1:
        advantages = advantages[:, 0]
    return {"old_logp": old, "advantages": advantages, "token_weight": weight}


def off_policy_mask(trainer: Any, batch: MicroBatch) -> Tensor | None:
    if trainer.off_policy_mask_threshold is None:
        return None
    rollout, threshold = batch.inputs.get("sampling_per_token_logps", batch.sampled), trainer.off_policy_mask_threshold
    return off_policy_sequence_mask(
        batch.logp.detach(), rollout, batch.inputs["advantages"], mask=batch.mask, threshold=threshold,
        unknown="neutral",
    )  # fmt: skip


def entropy_enabled(trainer: Any) -> bool:
    return getattr(trainer, "_entropy_bonus_enabled", False)


def entropy_coefficient(trainer: Any) -> float:
    """0 without a bonus; the adaptive one is that of the end of the last step."""
    if not entropy_enabled(trainer):
        return 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        return 0.0
    return trainer.entropy_coef


def terms_of(
    trainer: Any, inputs: dict[str, Any], mask: Tensor, keep: Tensor | None, how: dict[str, Any], shared: bool
) -> dict[str, Any]:
    """TRL's KL and entropy terms, which see none of the policy term's weights. keep: high_entropy's; how: weighting's;
    shared: the policy term has no weights of its own."""
    terms: dict[str, Any] = {}
    if trainer.beta != 0.0:
        corrected = LEVELS[trainer.importance_sampling_level] if trainer.args.use_bias_correction_kl else None
        terms |= {"ref_logp": inputs["ref_per_token_logps"], "kl_coef": float(trainer.beta), "kl_ratio": corrected}
        terms["kl_weight"] = None if shared else aggregation_weights(**how)
    if coefficient := entropy_coefficient(trainer):
        # A mean of the micro-batch, whatever loss_type divides by.
        weight = aggregation_weights("token-mean", mask=mask if keep is None else mask & keep.bool())
        terms |= {"entropy_coef": float(coefficient), "entropy_weight": weight / parts_of(trainer)}
    return terms


def loss_of(trainer: Any, batch: MicroBatch, row: Objective) -> tuple[Tensor, Any]:
    """(TRL's loss with its loss_type's objective or another, under the aggregation and normalizer of loss_type; metrics
    of the objective)."""
    how, keep = weighting(trainer, batch.inputs, batch.mask), high_entropy(trainer, batch)
    given = policy_inputs(trainer, batch.inputs, row)
    weight = None
    for factor in (given["token_weight"], off_policy_mask(trainer, batch), keep):
        if factor is not None:
            factor = factor.to(batch.logp.dtype).expand_as(batch.logp)
            weight = factor if weight is None else weight * factor
    given["token_weight"] = weight
    terms = terms_of(trainer, batch.inputs, batch.mask, keep, how, weight is None)
    terms |= {"entropy": batch.entropy} if "entropy_coef" in terms else {}
    if ratio_holds_rollout(trainer, row):
        loss, metrics = policy_loss(row, batch.logp, **given, **how)
        nothing = torch.zeros_like(given["advantages"])
        loss = loss + policy_loss(UNCLIPPED, batch.logp, batch.sampled, nothing, **how, **terms)[0]
    else:
        loss, metrics = policy_loss(row, batch.logp, **given, **how, **terms)
    if batch.auxiliary is not None:
        loss = loss + trainer.router_aux_loss_coef * batch.auxiliary / parts_of(trainer)
    return loss, metrics


def clips_by_position(trainer: Any, batch: MicroBatch, row: Objective) -> Tensor:
    """float64 [2, QUARTERS]: the tokens on which a clip is active, and all tokens, by the quarter of the completions'
    width in which they stand."""
    given = policy_inputs(trainer, batch.inputs, row)
    found = token_metrics(row, batch.logp, given["old_logp"], given["advantages"], mask=batch.mask)
    both = torch.stack([found.clip_low | found.clip_high | found.clip_dual, batch.mask]).sum(1, dtype=torch.float64)
    quarter = torch.arange(both.shape[1], device=both.device) * QUARTERS // max(both.shape[1], 1)
    return both.new_zeros(2, QUARTERS).index_add_(1, quarter, both)
