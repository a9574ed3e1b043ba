"""What a call of Liger's GRPO says, in tokenrl's terms."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...batch.checks import check_name, check_number, check_tensor, values_known
from ...errors import wrong
from ...losses.aggregation import aggregation_weights
from ...objectives.gates.kl import estimates
from ...objectives.policy import Objective, objective
from ...objectives.statistics import STATISTICS
from ..grpo import LEAST, LEVELS, MOST, grpo_objective

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
UNCLIPPED = ("cispo", "sapo", "vespo")  # for single tokens only, and without delta
KL = objective("kl_k3", clamp=math.inf)


@dataclass(frozen=True)
class Settings:
    """The keywords of both GRPO losses that no batch changes."""

    loss_type: str
    level: str
    beta: float
    eps_low: float
    eps_high: float
    delta: float | None
    sapo: tuple[float, float]
    vespo: dict[str, float]
    corrects_kl: bool
    max_completion_length: int | None

    def __post_init__(self) -> None:
        check_name("loss_type", self.loss_type, LOSS_TYPES)
        check_name("importance_sampling_level", self.level, LEVELS)
        check_number("beta", self.beta)
        for name, temperature in zip(("sapo_temperature_pos", "sapo_temperature_neg"), self.sapo, strict=True):
            check_number(name, temperature, above=0)
        if self.loss_type in UNCLIPPED and self.level == "sequence":
            raise wrong("importance_sampling_level", f"'sequence' with loss_type {self.loss_type!r}", "'token'")
        if self.delta is not None:
            check_number("delta", self.delta, above=0)
            if self.loss_type in UNCLIPPED:
                raise wrong("delta", f"{self.delta} with loss_type {self.loss_type!r}", "None")

    @property
    def row(self) -> Objective:
        return grpo_objective(
            self.loss_type, self.level, self.eps_low, self.eps_high, self.delta, self.sapo, self.vespo
        )

    @property
    def kl_ratio(self) -> str | None:
        return LEVELS[self.level] if self.corrects_kl else None

    def weighting(self, mask: Tensor, items: float | Tensor | None) -> dict[str, Any]:
        """mask, aggregation and normalizer."""
        rows, width = mask.shape
        modes: dict[str, tuple[str, Any]] = {
            "grpo": ("seq-mean-token-mean", rows),
            "sapo": ("seq-mean-token-mean", rows),
            "bnpo": ("token-mean", mask.sum().clamp(min=1)),
            "dr_grpo": ("token-sum", rows * (self.max_completion_length or width)),
            "luspo": ("token-sum", rows * width),
        }
        aggregation, normalizer = modes.get(self.loss_type) or ("token-sum", share_of_items(mask, items))
        return {"mask": mask, "aggregation": aggregation, "normalizer": normalizer}

    def policy_inputs(
        self, old: Tensor | None, ref: Tensor | None, advantages: Tensor, mask: Tensor, ratio: Tensor | None,
        items: float | Tensor | None,
    ) -> dict[str, Any]:  # fmt: skip
        """The keywords of policy_loss and linear_policy_loss. ref: None without a KL."""
        how = self.weighting(mask, items)
        given = how | {"old_logp": old, "advantages": advantages}
        if ref is not None:
            given |= {"ref_logp": ref, "kl": KL, "kl_coef": float(self.beta), "kl_ratio": self.kl_ratio}
        weight = mask.sum(1, keepdim=True).to(torch.float32) if self.loss_type == "luspo" else None
        if ratio is not None:
            if ref is not None:
                given["kl_weight"] = aggregation_weights(**how) * (1 if weight is None else weight)
            if self.row.gate.reads_rollout:
                if ref is not None and self.corrects_kl:
                    what = f"True with loss_type {self.loss_type!r} and vllm_is_ratio"
                    raise wrong("use_bias_correction_kl", what, "triton_grpo_loss with reduce=False")
                given["old_logp"] = held_by_ratio(old, ratio, mask)
            else:
                weight = ratio if weight is None else weight * ratio
        return given | {"token_weight": weight}

    def per_token(
        self, logp: Tensor, old: Tensor | None, ref: Tensor | None, advantages: Tensor, mask: Tensor,
        ratio: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(losses, KL estimates, 1 where a bound is active) [B, T], zero where the mask is; differentiable in logp."""
        row, t = self.row, mask.cumsum(1).to(logp.dtype)
        logp, a = torch.where(mask, logp, 0), advantages.to(logp.dtype)[:, None].expand_as(logp)
        old = logp.detach() if old is None else old
        own = torch.where(mask, logp - old, 0)
        if row.gate.reads_rollout and ratio is not None:
            old, ratio = held_by_ratio(old, ratio, mask), None
        x = torch.where(mask, logp - old, 0).clamp(-row.clamp, row.clamp)
        s = STATISTICS[row.statistic](x, mask, t)
        losses = row.gate.value(s, x, logp, a, t)
        losses = losses if ratio is None else losses * ratio
        kl = torch.zeros_like(logp)
        if ref is not None:
            kl = estimates(KL.gate, logp, ref, mask, math.inf, math.inf)
            if self.kl_ratio is not None:
                kl = kl * STATISTICS[self.kl_ratio](own, mask, t).exp()
            losses = losses + self.beta * kl
        low, high, _ = dataclasses.replace(self, delta=None).row.gate.clipped(s, x, logp, a, t)
        clipped = mask & ((low & (a < 0)) | (high & (a > 0)))
        return torch.where(mask, losses, 0), torch.where(mask, kl, 0), clipped.to(logp.dtype)


def held_by_ratio(old: Tensor | None, ratio: Tensor, mask: Tensor) -> Tensor:
    """The old log-probs whose ratio has the rollout's as a factor, one of a sequence spread over its tokens."""
    if old is None:
        raise wrong("old_per_token_logps", None, "log-probs, beside vllm_is_ratio with loss_type 'vespo'")
    log_weight = ratio.log().clamp(LEAST, MOST)
    return old - (log_weight if ratio.shape[1] > 1 else log_weight / mask.sum(1, keepdim=True).clamp(min=1))


def share_of_items(mask: Tensor, items: float | Tensor | None) -> Tensor:
    """The tokens of this process's part of the batch: of all processes divided by their number."""
    count = torch.as_tensor(mask.sum() if items is None else items, dtype=torch.float32, device=mask.device)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count.clamp(min=1)
    if items is None:
        count = count.clone()
        torch.distributed.all_reduce(count)
    return (count / torch.distributed.get_world_size()).clamp(min=1)


def mask_of(name: str, mask: Tensor | None, ids: Tensor) -> Tensor:
    """bool [B, T]"""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    check_tensor(name, mask)
    if mask.shape != ids.shape:
        raise wrong(name, f"shape {list(mask.shape)}", f"{list(ids.shape)}")
    if values_known(mask) and ((mask != 0) & (mask != 1)).any():
        raise wrong(name, "values between", "0 and 1 (weights of tokens: vllm_is_ratio)")
    return mask != 0


def wide(x: Tensor | None) -> Tensor | None:
    """Constants of the loss in fp32 at least."""
    return None if x is None else x.detach().to(torch.promote_types(x.dtype, torch.float32))


def ratio_of(ratio: Tensor | None, mask: Tensor) -> Tensor | None:
    """vllm_is_ratio, [B, T] or [B, 1]."""
    if ratio is None:
        return None
    check_tensor("vllm_is_ratio", ratio)
    rows, width = mask.shape
    if ratio.shape not in ((rows,), (rows, 1), (rows, width)):
        raise wrong("vllm_is_ratio", f"shape {list(ratio.shape)}", f"[{rows}], [{rows}, 1] or [{rows}, {width}]")
    return wide(ratio.reshape(rows, -1))
