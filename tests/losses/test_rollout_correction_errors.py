"""Wrong arguments of the rollout corrections: the error names the argument, what was given, what is accepted."""

import math

import pytest
import torch

from tokenrl import corrections as cor

LOGP, IDS = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)


def weights_of(**options):
    return cor.importance_weights(**{"logp": LOGP, "rollout_logp": LOGP, "high": 2.0, **options})


def kept_of(**options):
    return cor.rejection_mask(**{"logp": LOGP, "rollout_logp": LOGP, "statistic": "token_k1", "high": 2.0, **options})


def rows_of(**options):
    given = {"logp": LOGP, "rollout_logp": LOGP, "advantages": torch.zeros(2), "threshold": 0.5}
    return cor.off_policy_sequence_mask(**{**given, **options})


def top_of(**options):
    return cor.top_entropy_mask(**{"entropy": LOGP, **options})


@pytest.mark.parametrize(
    "call, options, message",
    [
        (weights_of, {"level": "geometrical"}, "level: .*Did you mean 'geometric'"),
        (weights_of, {"bound": "truncated"}, "bound: .*Did you mean 'truncate'"),
        (weights_of, {"normalize": "batches"}, "normalize: .*Did you mean 'batch'"),
        (weights_of, {"high": None}, "high: got None"),
        (weights_of, {"high": None, "bound": "mask"}, "high: got None, accepted: low, high or both"),
        (weights_of, {"bound": "none"}, "high: got 2.0, accepted: None"),
        (weights_of, {"bound": "none", "high": None, "low": 0.5}, "low: got 0.5, accepted: None"),
        (weights_of, {"low": 3.0}, "low: got 3.0, accepted: at most high, 2.0"),
        (weights_of, {"high": -1.0}, "high: got -1.0"),
        (weights_of, {"high": math.nan}, "high: got nan"),
        (weights_of, {"clamp": 0.0}, "clamp: got 0.0"),
        (weights_of, {"segment_ids": IDS}, "segment_ids: got a tensor, accepted: None"),
        (weights_of, {"level": "segment"}, "segment_ids: got None"),
        (weights_of, {"level": "segment", "segment_ids": LOGP}, "segment_ids: got dtype torch.float32"),
        (weights_of, {"level": "segment", "segment_ids": IDS[0]}, r"segment_ids: got shape \[3\]"),
        (weights_of, {"logp": LOGP.clone().requires_grad_()}, r"logp: got .*requires grad.*logp.detach\(\)"),
        (weights_of, {"rollout_logp": LOGP.clone().requires_grad_()}, "rollout_logp: got .*requires grad"),
        (weights_of, {"rollout_logp": LOGP.bfloat16()}, "rollout_logp: got dtype torch.bfloat16"),
        (weights_of, {"rollout_logp": LOGP[:1]}, r"rollout_logp: got shape \[1, 3\]"),
        (weights_of, {"mask": IDS}, "mask: got dtype torch.int64"),
        (kept_of, {"statistic": "seq_max_k1"}, "statistic: .*Did you mean 'seq_max_k"),
        (kept_of, {"high": None}, "high: got None"),
        (kept_of, {"low": 2.5}, "low: got 2.5, accepted: at most high"),
        (kept_of, {"statistic": "token_k3", "low": 0.1}, "low: got 0.1, accepted: None"),
        (kept_of, {"logp": LOGP.clone().requires_grad_()}, "logp: got .*requires grad"),
        (rows_of, {"threshold": None}, "threshold: got None"),
        (rows_of, {"threshold": math.nan}, "threshold: got nan"),
        (rows_of, {"advantages": torch.zeros(3)}, r"advantages: got shape \[3\]"),
        (rows_of, {"advantages": torch.zeros(2, requires_grad=True)}, "advantages: got .*requires grad"),
        (top_of, {"quantile": 0.0}, "quantile: got 0.0"),
        (top_of, {"quantile": 1.2}, "quantile: got 1.2"),
        (top_of, {"entropy": LOGP.clone().requires_grad_(), "threshold": 0.1}, "entropy: got .*requires grad"),
        (top_of, {"entropy": LOGP[0]}, r"entropy: got shape \[3\] without cu_seqlens"),
        (top_of, {"threshold": torch.zeros(2)}, r"threshold: got a tensor of shape \[2\]"),
        (top_of, {"mask": IDS}, "mask: got dtype"),
    ],
)
def test_errors_name_the_argument(call, options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_threshold_checks_its_mask():
    for mask in (torch.ones(3).bool(), IDS):
        with pytest.raises(ValueError, match="mask: got"):
            cor.entropy_threshold(LOGP, 0.2, mask)
