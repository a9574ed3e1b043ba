"""OpenRLHF 0.11.2. One line: `python -m tokenrl.integrations.openrlhf` in place of `-m openrlhf.cli.train_ppo_ray`.

OpenRLHF builds its PolicyLoss in Ray's workers: the launcher has each of them call use(), which imports nothing of
OpenRLHF. TOKENRL_OBJECTIVE names a row of tokenrl's table; without it the loss is OpenRLHF's own, by tokenrl.
"""

import math
import os
import runpy
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import wrong
from ..losses.policy import policy_loss
from ..losses.rollout_correction import rejection_mask
from ..objectives.policy import Objective, objective
from .hosts import PPO, VARIABLE, check_parameters, chosen_objective, clip_fraction, rebind, require
from .lazy import when_imported

LOSS, HOOK = "openrlhf.models.loss", "tokenrl.integrations.openrlhf.use"


class TokenRLLoss:
    """forward of OpenRLHF's PolicyLoss; the constructor with its checks, and the settings, stay OpenRLHF's."""

    def row(self: Any) -> Objective:
        bounds = {"eps_low": self.clip_eps_low, "eps_high": self.clip_eps_high, "dual": self.dual_clip or math.inf}
        chosen = chosen_objective("openrlhf", dict.fromkeys((*PPO, "gspo"), bounds))
        return chosen or objective(self.policy_loss_type, **bounds)

    def forward(
        self: Any, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None,
        rollout_log_probs: Any = None, dp_size: int = 1, batch_num_tokens: Any = None,
        global_batch_size: Any = None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """OpenRLHF: tensors [B, T]. Returns (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio), 0-d, on the device;
        the last two None without a correction."""
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
        row, old, corrected = self.row(), old_log_probs, self.is_correction_level != "off"
        ppo_kl, vllm_kl, filtered = mean(old - log_probs.detach(), mask), None, None
        given: dict[str, Any] = {}
        if corrected and row.name == "gspo":  # whose ratio it enters
            old = rollout_log_probs
        elif corrected:
            given, filtered = self.correction(old, rollout_log_probs, mask)
            vllm_kl = mean(rollout_log_probs - old, mask)
        name, count = "seq-mean-token-mean", global_batch_size
        if self.token_level_loss:
            name, count = "token-mean", batch_num_tokens
        total = None if count is None else count / dp_size
        loss, metrics = policy_loss(
            row, log_probs, old, advantages, mask=mask, aggregation=name, normalizer=total, **given
        )
        return loss, clip_fraction(metrics), ppo_kl, vllm_kl, filtered

    def correction(self: Any, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[dict[str, Any], Tensor]:
        """(arguments of policy_loss, the fraction of tokens or rows that is filtered or clipped)"""
        (low, high), of_rows = self.is_correction_threshold, self.is_correction_level == "seq"
        of_ratio = self.is_correction_gating == "ratio"
        bounds = {"low": 1 / high, "high": 1 / low if low > 0 else None} if of_ratio else {"high": high}
        statistic = ("seq_mean_" if of_rows else "token_") + ("k1" if of_ratio else self.is_correction_gating)
        kept = rejection_mask(old, rollout, statistic=statistic, mask=mask, **bounds)
        if self.is_correction_mode == "clip":
            given: dict[str, Any] = {"correction": {"bound": "truncate", "low": low, "high": high, "clamp": None}}
        else:
            given = {"correction": {"bound": "none", "clamp": None}, "token_weight": kept.to(old.dtype)}
        filtered = 1 - (kept.any(1).float().mean() if of_rows else mean(kept.float(), mask))
        return given | {"rollout_logp": rollout}, filtered


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Over the valid tokens."""
    return torch.where(mask, x, 0).sum() / mask.sum()


def use() -> None:
    """OpenRLHF's PolicyLoss of this process is tokenrl's, now or as soon as it is imported. Again: no effect."""
    require("openrlhf")
    chosen_objective("openrlhf", {})
    when_imported(LOSS, _replace)


def _replace(module: ModuleType) -> None:
    original = module.PolicyLoss
    if not issubclass(original, TokenRLLoss):
        check_parameters("openrlhf.models.PolicyLoss.forward", original.forward, TokenRLLoss.forward)
        rebind("openrlhf", {"PolicyLoss": original}, {"PolicyLoss": type("PolicyLoss", (TokenRLLoss, original), {})})


def main() -> None:
    """OpenRLHF's command line, its arguments unchanged."""
    import ray

    use()
    init = ray.init

    def with_hook(*args: Any, runtime_env: Any = None, **kwargs: Any) -> Any:
        env = dict(runtime_env or {})
        if hook := env.get("worker_process_setup_hook"):
            raise wrong("worker_process_setup_hook", hook, f"none beside {HOOK}; call that in yours")
        variables = {**env.get("env_vars", {}), VARIABLE: os.environ.get(VARIABLE, "")}
        return init(*args, runtime_env=env | {"env_vars": variables, "worker_process_setup_hook": HOOK}, **kwargs)

    ray.init = with_hook
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
