"""tokenrl: fused kernels for the loss head of RL post-training."""

import sys

from ._versions import check_versions, installed

check_versions()
__version__ = installed("tokenrl") or "unknown"  # of a checkout on the path

from . import advantages, compat  # noqa: E402
from .advantages import rewards  # noqa: E402
from .fusion.fused import fuse  # noqa: E402
from .instruments import parity  # noqa: E402
from .instruments.profiler import profile  # noqa: E402
from .instruments.record import record  # noqa: E402
from .instruments.rollout_batch import RolloutBatch, load_batch  # noqa: E402
from .logprobs.combined_head import combined_head  # noqa: E402
from .logprobs.divergence import linear_token_divergence, token_divergence  # noqa: E402
from .logprobs.from_hidden import linear_token_logprobs  # noqa: E402
from .logprobs.from_logits import token_logprobs  # noqa: E402
from .logprobs.token_stats import TokenStats  # noqa: E402
from .logprobs.topk import linear_topk_ids, topk_ids, topk_token_divergence, union_topk_ids  # noqa: E402
from .losses import rollout_correction as corrections  # noqa: E402
from .losses.aggregation import aggregation_weights  # noqa: E402
from .losses.building_blocks import group_aggregate, position_adaptive_clip, prefix_ratio  # noqa: E402
from .losses.distillation import distillation_loss, linear_distillation_loss, topk_distillation_loss  # noqa: E402
from .losses.linear_policy import linear_policy_loss  # noqa: E402
from .losses.linear_preference import LinearPreferenceMetrics, linear_preference_loss  # noqa: E402
from .losses.linear_topk import linear_topk_distillation_loss  # noqa: E402
from .losses.policy import policy_loss  # noqa: E402
from .losses.preference import PreferenceMetrics, preference_loss  # noqa: E402
from .losses.sft import linear_multi_token_loss, linear_sft_loss, sft_loss  # noqa: E402
from .losses.token_metrics import TokenMetrics, token_metrics  # noqa: E402
from .losses.unlearning import (  # noqa: E402
    UnlearningParts,
    linear_smoothing_kl,
    smoothing_kl,
    unlearning_loss,
)
from .losses.value import value_loss  # noqa: E402
from .methods import (  # noqa: E402
    adakd,
    akl,
    aligndistil,
    bounds,
    group_losses,
    intro,
    m2po,
    modes,
    on_policy_distillation,
    preference_weights,
    self_distillation,
    sft_weights,
    thoughts,
    token_selection,
    uld,
    xtoken,
)
from .methods import d3s as selection  # noqa: E402
from .methods import gtpo as conflicts  # noqa: E402
from .methods import thr as hidden_reward  # noqa: E402
from .methods import tw_grpo as divergence_weights  # noqa: E402
from .methods.a3po import proximal_logp  # noqa: E402
from .methods.dhpo import entropy_mix  # noqa: E402
from .methods.reward_shaped import linear_reward_shaped_nll, reward_shaped_nll  # noqa: E402
from .methods.topk_divergence import topk_divergence  # noqa: E402
from .objectives.distillation import DISTILLATIONS, Distillation, distillation  # noqa: E402
from .objectives.divergences import DIVERGENCES, Divergence, divergence  # noqa: E402
from .objectives.gates.base import Gate, parametrised  # noqa: E402
from .objectives.metrics import LinearMetrics, Metrics, TermMetrics  # noqa: E402
from .objectives.policy import OBJECTIVES, Objective, objective, register  # noqa: E402
from .objectives.preference import PREFERENCES, Preference, preference  # noqa: E402
from .objectives.unlearning import UNLEARNINGS, Unlearning, unlearning  # noqa: E402
from .ops.backends import register_triton  # noqa: E402

__all__ = [
    "DISTILLATIONS",
    "DIVERGENCES",
    "Distillation",
    "OBJECTIVES",
    "Divergence",
    "Gate",
    "LinearMetrics",
    "LinearPreferenceMetrics",
    "Metrics",
    "Objective",
    "PREFERENCES",
    "Preference",
    "PreferenceMetrics",
    "RolloutBatch",
    "TermMetrics",
    "TokenMetrics",
    "TokenStats",
    "UNLEARNINGS",
    "Unlearning",
    "UnlearningParts",
    "adakd",
    "advantages",
    "aggregation_weights",
    "akl",
    "aligndistil",
    "bounds",
    "combined_head",
    "compat",
    "conflicts",
    "corrections",
    "distillation",
    "distillation_loss",
    "divergence",
    "divergence_weights",
    "entropy_mix",
    "fuse",
    "group_aggregate",
    "group_losses",
    "hidden_reward",
    "intro",
    "linear_distillation_loss",
    "linear_multi_token_loss",
    "linear_policy_loss",
    "linear_preference_loss",
    "linear_reward_shaped_nll",
    "linear_sft_loss",
    "linear_smoothing_kl",
    "linear_token_divergence",
    "linear_token_logprobs",
    "linear_topk_distillation_loss",
    "linear_topk_ids",
    "load_batch",
    "m2po",
    "modes",
    "objective",
    "on_policy_distillation",
    "parametrised",
    "parity",
    "policy_loss",
    "position_adaptive_clip",
    "preference",
    "preference_loss",
    "preference_weights",
    "prefix_ratio",
    "profile",
    "proximal_logp",
    "record",
    "register",
    "register_triton",
    "reward_shaped_nll",
    "rewards",
    "selection",
    "self_distillation",
    "sft_loss",
    "sft_weights",
    "smoothing_kl",
    "thoughts",
    "token_divergence",
    "token_logprobs",
    "token_metrics",
    "token_selection",
    "topk_distillation_loss",
    "topk_divergence",
    "topk_ids",
    "topk_token_divergence",
    "uld",
    "union_topk_ids",
    "unlearning",
    "unlearning_loss",
    "value_loss",
    "xtoken",
]

# Rooms move, import paths stay: `import tokenrl.rewards` and `from tokenrl.rewards import rto` find these too.
for _name in (
    "bounds", "conflicts", "corrections", "divergence_weights", "hidden_reward", "parity", "rewards", "selection",
):  # fmt: skip
    sys.modules[f"{__name__}.{_name}"] = globals()[_name]
