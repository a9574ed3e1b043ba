"""tokenrl: fused kernels for the loss head of RL post-training."""

from ._versions import check_versions

check_versions()

from . import advantages, compat, corrections, parity  # noqa: E402
from .aggregate import aggregation_weights  # noqa: E402
from .gate import Gate, parametrised  # noqa: E402
from .linear import linear_token_logprobs  # noqa: E402
from .linear_policy import linear_policy_loss  # noqa: E402
from .logprobs import TokenStats, token_logprobs  # noqa: E402
from .metrics import LinearMetrics, Metrics, TermMetrics  # noqa: E402
from .objectives import OBJECTIVES, Objective, objective  # noqa: E402
from .parts import group_aggregate, position_adaptive_clip, prefix_ratio  # noqa: E402
from .policy import policy_loss  # noqa: E402
from .registry import register, register_triton  # noqa: E402

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
    "compat",
    "corrections",
    "group_aggregate",
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
    "token_logprobs",
]
