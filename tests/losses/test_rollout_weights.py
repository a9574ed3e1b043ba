"""Importance weights of the rollout correction against verl's outputs (tests/golden) and their formulas in loops."""

import math

import pytest
import torch
from golden_data import INDEX, arrays, near
from rollout_cases import FAMILY, SEGMENTS, VALID, batch, golden_range, loop_spans

from tokenrl import corrections as cor


def loop_weights(logp, rollout, level, bound, low, high, clamp, normalize):
    spans = loop_spans({"geometric": "sequence"}.get(level, level))
    weights = []
    for row, there in spans:
        s = sum(float(logp[row, t] - rollout[row, t]) for t in there)
        if level in ("geometric", "segment"):
            s /= len(there)
        w = math.exp(s if clamp is None else min(max(s, -clamp), clamp))
        if bound == "truncate":
            w = max(min(w, high), low or 0.0)
        elif bound == "mask" and not (low or 0.0) <= w <= (math.inf if high is None else high):
            w = 0.0
        weights.append(w)
    mean = (sum(weights) / len(weights) if normalize == "batch" else 1.0) or 1.0
    out = torch.zeros(VALID.shape, dtype=torch.float64)
    for (row, there), w in zip(spans, weights, strict=True):
        for t in there:
            out[row, t] = w / mean
    return out


# Read when tests run, so that a missing entry fails them and not their collection.
@pytest.mark.parametrize("case", [f"weights.{i}" for i in range(6)])
def test_golden_weights(case):
    x, config = arrays(FAMILY, case), INDEX[FAMILY]["cases"][case]["config"]
    low, high = golden_range(config["rollout_is_threshold"])
    weights = cor.importance_weights(
        x["old_logp"], x["rollout_logp"], mask=x["mask"], level=config["rollout_is"], low=low, high=high,
        bound="truncate" if low is None else "mask",
        normalize="batch" if config["rollout_is_batch_normalize"] else "none",
    )  # fmt: skip
    near(weights, x["weights"], case)


BOUNDS = (
    ("truncate", None, 1.3), ("truncate", 0.8, 1.3), ("mask", 0.7, 1.6), ("mask", None, 1.3), ("mask", 0.9, None),
    ("none", None, None),
)  # fmt: skip


@pytest.mark.parametrize("level", cor.LEVELS)
@pytest.mark.parametrize("bound, low, high", BOUNDS)
@pytest.mark.parametrize("normalize", cor.NORMALIZATIONS)
def test_weights_are_their_formula(level, bound, low, high, normalize):
    logp, rollout = batch()
    segments = {"segment_ids": SEGMENTS} if level == "segment" else {}
    for clamp in (20.0, 0.2, None):
        weights = cor.importance_weights(
            logp, rollout, mask=VALID, level=level, bound=bound, low=low, high=high, clamp=clamp, normalize=normalize,
            **segments,
        )  # fmt: skip
        near(weights, loop_weights(logp, rollout, level, bound, low, high, clamp, normalize), f"{level} {clamp}")
        assert (weights[~VALID] == 0).all() and not weights.requires_grad
