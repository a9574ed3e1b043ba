"""verl's own loss modes in tokenrl's terms: the row, its parameters in verl's config, its counts and its metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...objectives.policy import Objective
from .batch import Batch, positive, setting

KL, CLIPPED, LOWER = "actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower"
HARD_WIRED = "seq-mean-token-mean"  # in verl's sapo, and in its gspo before 0.9.1
LARGEST = 20.0  # of a log ratio, in most modes of verl
Sums = dict[str, Tensor]
Counts = tuple[str, float | Tensor | None]


def bounds(config: Any) -> dict[str, Any]:
    both = config.clip_ratio
    return {
        "eps_low": setting(config, "clip_ratio_low", both),
        "eps_high": setting(config, "clip_ratio_high", both),
    }


def dual_bounds(config: Any) -> dict[str, Any]:
    return bounds(config) | {"dual": positive("clip_ratio_c", setting(config, "clip_ratio_c", 3.0), above=1)}


def relative_bounds(config: Any) -> dict[str, Any]:
    return bounds(config) | {"bound": "relative"}


def divergences(config: Any) -> dict[str, Any]:
    return bounds(config) | {"ceiling": float(setting(config, "clip_ratio_c", 20.0))}


def temperatures(config: Any) -> dict[str, Any]:
    return {name: float(getattr(config, name)) for name in ("tau_pos", "tau_neg")}


def clipped_covariance(config: Any) -> dict[str, Any]:
    names = {"fraction": ("clip_cov_ratio", 2e-4), "low": ("clip_cov_lb", 1.0), "high": ("clip_cov_ub", 5.0)}
    found = {ours: setting(config.policy_loss, *theirs) for ours, theirs in names.items()}
    return bounds(config) | found | {"fraction": positive("clip_cov_ratio", found["fraction"])}


def penalised_covariance(config: Any) -> dict[str, Any]:
    fraction = positive("kl_cov_ratio", setting(config.policy_loss, "kl_cov_ratio", 2e-4))
    return {"fraction": fraction, "coef": setting(config.policy_loss, "ppo_kl_coef", 1.0)}


def quadratic(config: Any) -> dict[str, Any]:
    return {"beta": positive("dro_beta", setting(config.policy_loss, "dro_beta"))}


def nothing(config: Any) -> dict[str, Any]:
    return {}


def as_configured(batch: Batch) -> Counts:
    return batch.counts(batch.aggregation)


def of_sequences(batch: Batch) -> Counts:
    return batch.counts(HARD_WIRED)


def of_all_rows(batch: Batch) -> Counts:
    """geo_mean's: empty rows count, other ranks do not."""
    return "seq-mean-token-mean", batch.mask.shape[0]


def given_weight(batch: Batch) -> Tensor | None:
    return batch.weight


def geometric_weight(batch: Batch) -> Tensor | None:
    if batch.weight is None:
        return None
    log_weight = torch.where(batch.mask, (batch.weight + 1e-10).log(), 0).sum(1) / batch.mask.sum(1).clamp(min=1)
    return log_weight.exp()[:, None].expand_as(batch.weight)


def common(batch: Batch, row: Objective, raw: Sums) -> Sums:
    """Sums over tokens; raw: those of the kernel by name."""
    return {CLIPPED: raw["clip_low"] + raw["clip_high"], KL: -raw["log_ratio_sum"], LOWER: raw["clip_dual"]}


def of_given(batch: Batch, row: Objective, raw: Sums) -> Sums:
    """Rows whose log ratio is not verl's: dppo's has no clamp, vespo's has the rollout's weights in it."""
    return common(batch, row, raw) | {KL: batch.total(-batch.log_ratio.clamp(-LARGEST, LARGEST))}


def of_gate(batch: Batch, row: Objective) -> Tensor:
    """bool [B, T]: the tokens that the row's gate clips by itself."""
    x = batch.log_ratio
    low, high, _ = row.gate.clipped(x, x, batch.logp.detach(), batch.advantages, x)
    return low | high


def of_dropped(batch: Batch, row: Objective, raw: Sums) -> Sums:
    """clip_cov: verl counts what its covariance drops, without what the ratio clips."""
    found = common(batch, row, raw)
    return found | {CLIPPED: found[CLIPPED] - batch.total(of_gate(batch, row))}


def of_either_bound(batch: Batch, row: Objective, raw: Sums) -> Sums:
    """geo_mean: verl counts tokens beyond either bound, by the sign of A."""
    parameters: Any = row.form
    outside = (batch.log_ratio < -parameters.eps_low) | (batch.log_ratio > parameters.eps_high)
    counts = (batch.total(outside & sign) for sign in (batch.advantages > 0, batch.advantages < 0))
    return common(batch, row, raw) | dict(zip((CLIPPED, LOWER), counts, strict=True))


def of_sizes(batch: Batch, row: Objective, raw: Sums) -> Sums:
    """kl_cov: the mean of |x|."""
    return {KL: batch.total(batch.log_ratio.abs())}


@dataclass(frozen=True)
class Mode:
    """row: of tokenrl's table. settings: config -> its parameters. keys: verl's metrics of the mode."""

    row: str
    settings: Callable[[Any], dict[str, Any]] = nothing
    keys: tuple[str, ...] = (CLIPPED, KL, LOWER)
    sums: Callable[[Batch, Objective, Sums], Sums] = common
    counts: Callable[[Batch], Counts] = as_configured
    weight: Callable[[Batch], Tensor | None] = given_weight


MODES = {
    "vanilla": Mode("ppo", dual_bounds),
    "gspo": Mode("gspo_token", bounds),
    "sapo": Mode("sapo", temperatures),
    "gpg": Mode("gpg", keys=()),
    "clip_cov": Mode("clip_cov", clipped_covariance, (CLIPPED, KL), of_dropped),
    "kl_cov": Mode("kl_cov", penalised_covariance, (KL,), of_sizes),
    "geo_mean": Mode("gmpo", bounds, sums=of_either_bound, counts=of_all_rows, weight=geometric_weight),
    "dro": Mode("dro", quadratic, (KL,)),
    "cispo": Mode("cispo", relative_bounds),
    "dppo_tv": Mode("dppo_tv", divergences, sums=of_given),
    "dppo_kl": Mode("dppo_kl", divergences, sums=of_given),
}

# Rows that are a mode of verl, but for its hard-wired counts: they read the same fields of verl's config.
SETTINGS = {mode.row: mode.settings for mode in MODES.values()} | {
    "grpo": dual_bounds, "dr_grpo": dual_bounds, "dapo": dual_bounds, "bnpo": dual_bounds, "gspo": bounds,
}  # fmt: skip
