"""SkyRL 0.3.0: trainer.override_entrypoint=tokenrl.integrations.skyrl and policy_loss_type=tokenrl_ctpo.

The entry point fills SkyRL's registry, which carries itself to Ray's workers, and goes on to SkyRL's own; a program of
one's own calls register() before its initialize_ray.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import wrong
from ..losses.policy import policy_loss
from ..objectives.gates.kl import KlGate
from ..objectives.policy import OBJECTIVES, Objective, find_objective, objective
from .hosts import PPO, at_least_fp32, check_parameters, chosen, needed_by, require, say, weighed
from .probes import scales_with_advantages

UTILS, MAIN = "skyrl.backends.skyrl_train.utils", "skyrl.train.entrypoints.main_base"
DUAL = "dual_clip"  # a row of SkyRL's: ppo with a bound more
REDUCTIONS = {  # SkyRL's names of aggregations
    "token_mean": "token-mean", "token_mean_legacy": "token-mean", "sequence_mean": "seq-mean-token-mean",
    "seq_mean_token_sum_norm": "seq-mean-token-sum-norm", "prompt_mean": "group-mean",
}  # fmt: skip


def settings(config: Any) -> dict[str, dict[str, Any]]:
    """What rows take from SkyRL's AlgorithmConfig."""
    bounds = {"eps_low": config.eps_clip_low, "eps_high": config.eps_clip_high}
    weight = {"eps_low": config.cispo.cispo_eps_clip_low, "eps_high": config.cispo.cispo_eps_clip_high}
    return dict.fromkeys((*PPO, "gspo", "gspo_token"), bounds) | {
        DUAL: bounds | {"dual": config.clip_ratio_c},
        "cispo": weight | {"bound": "relative"},
        "sapo": {"tau_pos": config.sapo.tau_pos, "tau_neg": config.sapo.tau_neg},
        "ratio": {"clamp": math.inf},
    }


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """What SkyRL's registry holds as tokenrl_<name>; refused: why SkyRL cannot feed it."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""

    def row(self, config: Any) -> Objective:
        return objective("ppo" if self.name == DUAL else self.name,
                         **{**settings(config).get(self.name, {}), **self.parameters})  # fmt: skip

    def __call__(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, config: Any,
        loss_mask: Tensor | None = None, rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        """SkyRL: tensors [B, T], its normaliser a factor of the advantages. Returns (the sum over the tokens, floats),
        after one wait for the device beside those of SkyRL's correction of the rollout."""
        if self.refused:
            raise ValueError(self.refused)
        row, reported, weight = self.row(config), {}, None
        if REDUCTIONS.get(config.loss_reduction) != row.aggregation:
            reduction = f"loss_reduction {config.loss_reduction!r}"
            say(f"tokenrl_{self.name}: {reduction}, the method's own is {row.aggregation!r}")
        loss_mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        if rollout_logprobs is not None:
            correct = import_module(f"{UTILS}.off_policy_correction_utils").compute_off_policy_correction
            given = old_log_probs, rollout_logprobs, loss_mask, config.off_policy_correction
            ratio, reported, weight = correct(*given)
            weight = (weight if ratio is None else weight * ratio).expand_as(log_probs)
        old, weight = weighed(row, old_log_probs, weight)
        loss, metrics = policy_loss(
            row, at_least_fp32(log_probs), old, advantages, mask=loss_mask > 0, token_weight=weight,
            aggregation="token-sum",
        )  # fmt: skip
        ours = {key: value for key, value in metrics.as_dict().items() if metrics.tokens}
        found = {"clip_ratio": ours.get("clip_low", 0.0) + ours.get("clip_high", 0.0)}
        return loss, found | reported | {f"tokenrl/{key}": ours.get(key, 0.0) for key in ("ess", "ratio_max")}


def refusal(name: str) -> str:
    row, given = find_objective("ppo" if name == DUAL else name), repr(name)
    if needs := needed_by(row):
        return str(wrong("policy_loss_type", f"{given}, which needs {needs}", "a row of what SkyRL hands to its loss"))
    if not scales_with_advantages(row):
        accepted = "rows that are linear in the advantages (SkyRL folds its normaliser into them)"
        return str(wrong("policy_loss_type", given, accepted))
    return ""


def register() -> None:
    """All policy rows in SkyRL's registry; those that SkyRL cannot feed say so. TOKENRL_OBJECTIVE may give one of them
    parameters. Again: no effect."""
    require("skyrl")
    registry, (changed, parameters) = import_module(f"{UTILS}.ppo_utils").PolicyLossRegistry, chosen() or ("", {})
    check_parameters("SkyRL's loss 'regular'", registry.get("regular"), PolicyLoss("ppo"))
    known, rows = registry.list_available(), [n for n, row in OBJECTIVES.items() if not isinstance(row.gate, KlGate)]
    for name in (*rows, DUAL):
        if f"tokenrl_{name}" not in known:
            loss = PolicyLoss(name, parameters if name == changed else {}, refusal(name))
            registry.register(f"tokenrl_{name}", loss)


def main() -> None:
    """SkyRL's entry point."""
    register()
    for argument in sys.argv[1:]:
        name = argument.removeprefix("trainer.algorithm.policy_loss_type=tokenrl_")
        if name != argument and (why := refusal(name)):
            raise ValueError(why)
    sys.argv = [argument for argument in sys.argv if not argument.startswith("trainer.override_entrypoint=")]
    import_module(MAIN).main()
