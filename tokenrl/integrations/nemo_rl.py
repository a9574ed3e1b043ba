"""NeMo-RL 0.6. One line: `python -m tokenrl.integrations.nemo_rl SCRIPT ...` in place of `python SCRIPT ...`.

NeMo-RL builds its ClippedPGLossFn where the script runs and sends it to the workers, which find this module by name.
TOKENRL_OBJECTIVE names a row of tokenrl's table; without it the loss is NeMo-RL's own, by tokenrl.
"""

import copy
import math
import runpy
import sys
from typing import Any

import torch
from torch import Tensor

from ..losses.policy import policy_loss
from ..losses.rollout_correction import rejection_mask
from ..objectives.policy import Objective, objective
from .hosts import PPO, check_parameters, chosen_objective, rebind, require

require("nemo_rl")

from nemo_rl.algorithms.loss import loss_functions  # noqa: E402


class ClippedPGLossFn(loss_functions.ClippedPGLossFn):
    """NeMo-RL's, with its configuration, its metrics, KL and NLL terms; the objective is tokenrl's."""

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any):
        super().__init__(cfg, *args, **kwargs)
        self.tokenrl_row = self.row()

    def row(self) -> Objective:
        bounds = {"eps_low": self.ratio_clip_min, "eps_high": self.ratio_clip_max}
        ppo = bounds | {"dual": self.ratio_clip_c or math.inf, "clamp": math.inf}
        cispo = bounds | {"bound": "relative", "clamp": math.inf}
        settings = dict.fromkeys((*PPO, "gspo"), ppo) | {"cispo": cispo}
        own = "cispo" if self.use_cispo else "gspo" if self.sequence_level_importance_ratios else "ppo"
        if self.disable_ppo_ratio and not self.force_on_policy_ratio:
            own = "reinforce"
        return chosen_objective("nemo_rl", settings) or objective(own, **settings.get(own, {}))

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """NeMo-RL: next_token_logprobs [B, T - 1], data's tensors [B, T]. Returns (loss, NeMo-RL's metrics)."""
        counts = {"global_valid_seqs": global_valid_seqs, "global_valid_toks": global_valid_toks}
        # Without advantages NeMo-RL's loss is its other terms.
        rest_of = copy.copy(data)
        rest_of["advantages"] = torch.zeros_like(data["advantages"])
        has_rest = self.reference_policy_kl_penalty != 0 or self.positive_example_nll_weight > 0
        with torch.set_grad_enabled(has_rest and torch.is_grad_enabled()):
            rest, metrics = super().__call__(next_token_logprobs, rest_of, **counts)
        loss = self.policy_term(next_token_logprobs, data, **counts)
        loss = loss + rest if has_rest else loss
        return loss, metrics | {"loss": loss.item()}

    def policy_term(self, logp: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor) -> Tensor:
        weight = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).to(logp.dtype)
        mask = weight > 0
        old = None if self.force_on_policy_ratio else data["prev_logprobs"][:, 1:]
        given: dict[str, Any] = {"aggregation": "seq-mean-token-mean", "normalizer": global_valid_seqs}
        if self.loss_type is loss_functions.LossType.TOKEN_LEVEL:
            given = {"aggregation": "token-mean", "normalizer": global_valid_toks}
        if self.use_importance_sampling_correction:
            rollout = data["generation_logprobs"][:, 1:]
            given |= {"rollout_logp": rollout, "correction": self.correction()}
            if self.truncated_importance_sampling_type == "seq-mask-tis":
                low, high = self.truncated_importance_sampling_ratio_min, self.truncated_importance_sampling_ratio
                inverse = {"low": 1 / high, "high": 1 / low if low > 0 else None}
                current = logp.detach() if old is None else old
                weight = weight * rejection_mask(current, rollout, statistic="seq_mean_k1", mask=mask, **inverse)
        advantages = data["advantages"][:, 1:]
        return policy_loss(self.tokenrl_row, logp, old, advantages, mask=mask, token_weight=weight, **given)[0]

    def correction(self) -> dict[str, Any]:
        level = "sequence" if self.sequence_level_importance_ratios else "token"
        bound = {"tis": "truncate", "icepop": "mask"}.get(self.truncated_importance_sampling_type, "none")
        found = {"level": level, "bound": bound, "clamp": None}
        if bound == "none":
            return found
        return found | {"low": self.truncated_importance_sampling_ratio_min or None,
                        "high": self.truncated_importance_sampling_ratio}  # fmt: skip


def use() -> None:
    """Whatever of NeMo-RL builds a ClippedPGLossFn from now on builds ours. Again: no effect."""
    chosen_objective("nemo_rl", {})
    original = ClippedPGLossFn.__base__
    check_parameters("ClippedPGLossFn.__call__", original.__call__, ClippedPGLossFn.__call__)
    rebind("nemo_rl", {"ClippedPGLossFn": original}, {"ClippedPGLossFn": ClippedPGLossFn})


def main() -> None:
    """A script of NeMo-RL, its arguments unchanged."""
    use()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    from tokenrl.integrations import nemo_rl  # where workers look its class up

    nemo_rl.main()
