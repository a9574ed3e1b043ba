"""tokenrl: fused kernels for the loss head of RL post-training."""

from ._versions import check_versions

check_versions()

from . import (  # noqa: E402
    advantages,
    bounds,
    compat,
    conflicts,
    corrections,
    divergence_weights,
    hidden_reward,
    parity,
    rewards,
    selection,
)
from .aggregate import aggregation_weights  # noqa: E402
from .entropy_mix import entropy_mix  # noqa: E402
from .gate import Gate, parametrised  # noqa: E402
from .linear import linear_token_logprobs  # noqa: E402
from .linear_policy import linear_policy_loss  # noqa: E402
from .logprobs import TokenStats, token_logprobs  # noqa: E402
from .metrics import LinearMetrics, Metrics, TermMetrics  # noqa: E402
from .objectives import OBJECTIVES, Objective, objective  # noqa: E402
from .parts import group_aggregate, position_adaptive_clip, prefix_ratio  # noqa: E402
from .policy import policy_loss  # noqa: E402
from .registry import register, register_triton  # noqa: E402
from .topk_divergence import topk_divergence  # noqa: E402

__all__ = [
    "OBJECTIVES",
    "Gate",
    "LinearMetrics",
    "Metrics",
    "Objective",
    "TermMetrics",
    "TokenStats",
    "advantages",
    "aggregation_weights",
    "bounds",
    "compat",
    "conflicts",
    "corrections",
    "divergence_weights",
    "entropy_mix",
    "group_aggregate",
    "hidden_reward",
    "linear_policy_loss",
    "linear_token_logprobs",
    "objective",
    "parametrised",
    "parity",
    "policy_loss",
    "position_adaptive_clip",
    "prefix_ratio",
    "register",
    "register_triton",
    "rewards",
    "selection",
    "token_logprobs",
    "topk_divergence",
]
