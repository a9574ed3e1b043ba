"""torchtitan's RL experiment (0.2.2). In a configuration, in place of DAPOLoss.Config(...), by itself or in a
ChunkedLossWrapper.Config:

    from tokenrl.integrations.torchtitan import PolicyLoss
    PolicyLoss.Config(objective="cispo", parameters={"eps_high": 4.0})

Without an objective it is DAPOLoss, by tokenrl. torchtitan hands its loss no boundaries of sequences, so that only rows
of single tokens train. It computes its metrics itself, without gradient.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import wrong
from ..losses.policy import policy_loss
from ..objectives.policy import objective
from .hosts import PPO, check_fed, check_parameters, require

require("torchtitan")

from torchtitan.experiments.rl.losses import dapo  # noqa: E402


class PolicyLoss(dapo.DAPOLoss):
    """objective: a row of tokenrl's table with its parameters; "": DAPOLoss."""

    @dataclass(kw_only=True, slots=True)
    class Config(dapo.DAPOLoss.Config):
        objective: str = ""
        parameters: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__(config, **kwargs)
        bounds = {"eps_low": config.ratio_clip_low, "eps_high": config.ratio_clip_high, "clamp": dapo._MAX_LOG_RATIO}
        name = config.objective or "dapo"
        self.row = objective(name, **{**(bounds if name in PPO else {}), **config.parameters})
        check_fed("torchtitan", self.row)
        if self.row.statistic != "token" or self.row.form is not None:
            raise wrong("objective", repr(name), "a row of single tokens; torchtitan hands its loss no sequences")

    def __call__(
        self, logits: Tensor, labels: Tensor, global_valid_tokens: float | None = None, *, generator_logprobs: Tensor,
        advantages: Tensor, loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """torchtitan: logits [T, V], the others [T]. Returns (loss, torchtitan's metrics)."""
        original = dapo.compute_logprobs
        logp, entropy = original(logits, labels, return_entropy=True)
        rest = {"generator_logprobs": generator_logprobs, "advantages": advantages, "loss_mask": loss_mask}
        dapo.compute_logprobs = lambda *args, **kwargs: (logp.detach(), entropy)
        try:
            with torch.no_grad():
                _, metrics = super().__call__(logits, labels, global_valid_tokens, **rest)
        finally:
            dapo.compute_logprobs = original
        loss, _ = policy_loss(
            self.row, logp, generator_logprobs, advantages, mask=loss_mask & generator_logprobs.isfinite(),
            cu_seqlens=torch.tensor([0, len(logp)], device=logp.device), advantages_per="token",
            aggregation="token-mean", normalizer=max(global_valid_tokens or 1, 1),
        )  # fmt: skip
        return loss, metrics | {"loss/mean": loss.detach()}


check_parameters("torchtitan's DAPOLoss", dapo.DAPOLoss.__call__, PolicyLoss.__call__)
