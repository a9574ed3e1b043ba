"""A row of tokenrl's table behind the signature of verl's policy losses."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import wrong
from ...losses.policy import policy_loss
from ...objectives.metrics import RAW, Metrics
from ...objectives.policy import OBJECTIVES, Objective, objective
from ..hosts import at_least_fp32, say, weighed
from .batch import Batch, setting
from .modes import HARD_WIRED, MODES, Mode, common, of_given, of_sequences

PARAMETERS = (
    "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights",
)  # fmt: skip
OURS = ("ess", "ratio_max")  # beside verl's metrics


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """What verl's registry holds. loss_mode: its name there. row: tokenrl's, with `parameters` changed; mode: how
    verl's config is read, counted and reported."""

    loss_mode: str
    row: Objective
    mode: Mode
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor,
        loss_agg_mode: str = "token-mean", config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        """verl: all tensors [B, T], config its ActorConfig. Returns (loss 0-d, verl's metrics and beside them ess and
        ratio_max of tokenrl), after one wait for the device."""
        if config is None:
            raise wrong("config", None, "verl's ActorConfig")
        logp = at_least_fp32(log_prob)
        batch = Batch(
            logp, old_log_prob.detach().to(logp.dtype), advantages.detach().to(logp.dtype), response_mask.bool(),
            rollout_is_weights, loss_agg_mode, config,
        )  # fmt: skip
        row = self.row_for(config)
        old_logp, weight = weighed(row, batch.old_logp, self.mode.weight(batch))
        aggregation, normalizer = self.mode.counts(batch)
        loss, metrics = policy_loss(
            row, logp, old_logp, batch.advantages, mask=batch.mask, aggregation=aggregation, normalizer=normalizer,
            token_weight=None if weight is None else weight.detach().to(logp.dtype),
        )  # fmt: skip
        with torch.no_grad():
            return loss, self.reported(batch, row, metrics.raw)

    def row_for(self, config: Any) -> Objective:
        """The row with verl's settings, below those of the environment and of the config's tokenrl_objective_kwargs."""
        given = setting(setting(config, "policy_loss"), "tokenrl_objective_kwargs", {})
        changes = {**self.mode.settings(config), **self.parameters, **given}
        return objective(self.row, **changes)

    def reported(self, batch: Batch, row: Objective, raw: Tensor) -> dict[str, float]:
        sums = self.mode.sums(batch, row, dict(zip(RAW, raw.unbind(), strict=True)))
        values = torch.cat([raw, *(sums[key].to(raw.dtype)[None] for key in self.mode.keys)]).tolist()
        tokens = max(values[0], 1)  # a micro-batch without any reports zeros, as verl's
        found = {key: value / tokens for key, value in zip(self.mode.keys, values[len(RAW) :], strict=True)}
        ours = Metrics(torch.tensor(values[: len(RAW)], dtype=torch.float64)).as_dict()
        return found | {f"tokenrl/{name}": ours[name] if values[0] else 0.0 for name in OURS}


@dataclass(frozen=True, eq=False)
class OwnLoss(PolicyLoss):
    """A row by its own name, which says where verl aggregates otherwise than its method."""

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, float]]:
        aggregation = kwargs.get("loss_agg_mode", args[4] if len(args) > 4 else "token-mean")
        if aggregation != self.row.aggregation:
            say(f"{self.loss_mode}: loss_agg_mode {aggregation!r}, the method's own is {self.row.aggregation!r}")
        return super().__call__(*args, **kwargs)


def own_loss(
    name: str, row: Objective, settings: Callable[[Any], dict[str, Any]], parameters: Mapping[str, Any]
) -> PolicyLoss:
    """The loss of a row as tokenrl_<name>; settings: what it takes of verl's config."""
    if "aggregation" in parameters:
        raise wrong("aggregation", parameters["aggregation"], "verl's actor.loss_agg_mode")
    objective(row, **parameters)
    mode = Mode(row.name, settings, sums=of_given if row.gate.reads_rollout else common)
    return OwnLoss(f"tokenrl_{name}", row, mode, dict(parameters))


def host_loss(name: str, original: Callable[..., Any]) -> PolicyLoss:
    """The loss with the numbers of a function of verl's, that of the mode of that name."""
    mode = MODES[name]
    if HARD_WIRED in inspect.unwrap(original).__code__.co_consts:
        mode = replace(mode, counts=of_sequences)
    return PolicyLoss(name, OBJECTIVES[mode.row], mode)
