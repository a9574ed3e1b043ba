"""What verl hands to a policy loss, and the counts that its aggregation modes divide by."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ...batch.checks import check_name
from ...errors import wrong

CORE = "verl.trainer.ppo.core_algos"
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@cache
def counts_rows(agg_loss: Callable[..., Tensor]) -> bool:
    """Whether verl's "seq-mean-token-sum-norm" is divided by the rows too, as it is from 0.7.1 on."""
    ones = torch.ones(2, 1)
    return float(agg_loss(ones, ones, "seq-mean-token-sum-norm")) == 1


@dataclass(frozen=True)
class Batch:
    """One call. logp, old_logp, advantages: [B, T]; mask: bool [B, T]; weight: the rollout's importance weights [B, T],
    None without correction; aggregation: verl's loss_agg_mode; config: verl's ActorConfig."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    mask: Tensor
    weight: Tensor | None
    aggregation: str
    config: Any

    @cached_property
    def log_ratio(self) -> Tensor:
        """[B, T], 0 in masked cells, without gradient."""
        return torch.where(self.mask, self.logp.detach() - self.old_logp, 0)

    def total(self, x: Tensor) -> Tensor:
        """The sum over the valid tokens, float64."""
        return torch.where(self.mask, x, 0).sum(dtype=torch.float64)

    def counts(self, aggregation: str) -> tuple[str, float | Tensor | None]:
        """(aggregation, normalizer) of tokenrl.policy_loss for verl's agg_loss with config.global_batch_info."""
        check_name("loss_agg_mode", aggregation, AGGREGATIONS)
        info: Mapping[str, Any] = getattr(self.config, "global_batch_info", None) or {}
        parts = info.get("dp_size") or 1  # whose mean is taken
        if aggregation == "token-sum":
            return aggregation, 1 / parts
        over_width = aggregation == "seq-mean-token-sum-norm"
        scale = (info.get("loss_scale_factor") or self.mask.shape[1]) if over_width else 1
        if over_width and not counts_rows(sys.modules[CORE].agg_loss):
            return "token-sum", scale
        name = "batch_num_tokens" if aggregation == "token-mean" else "global_batch_size"
        count = info.get(name)
        if count is None and parts > 1:
            raise wrong(name, None, f"the count of the global batch; dp_size is {parts}")
        if count is None and not over_width:
            return aggregation, None
        count = self.mask.any(1).sum() if count is None else count
        return "token-sum" if over_width else aggregation, count * scale / parts


def setting(config: Any, name: str, default: Any = None) -> Any:
    """A field of verl's dataclasses or of an OmegaConf; the default where it is missing or None."""
    value = getattr(config, name, None)
    return default if value is None else value


def positive(name: str, value: Any, above: float = 0.0) -> float:
    if value is None or not above < value < math.inf:
        raise wrong(name, value, f"a number above {above:g}")
    return float(value)
