"""A batch of two policies, the spans whose tokens share a weight, and the range that verl writes as text."""

import math

import torch

FAMILY = "verl_rollout_correction"
VALID = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1]]).bool()
SEGMENTS = torch.tensor([[3, 3, 9, 3, 4, 0], [1, 1, 2, 2, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 7, 1, 5]])
RUNS = [[[0, 1, 3], [4]], [[0, 1], [2, 3], [4, 5]], [], [[1, 2, 4], [5]]]  # what SEGMENTS means


def batch(seed=0, scale=0.6, garbage=math.nan):
    generator = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(VALID.shape, generator=generator, dtype=torch.float64) * 3
    logp = rollout + scale * torch.randn(VALID.shape, generator=generator, dtype=torch.float64)
    return torch.where(VALID, logp, garbage), torch.where(VALID, rollout, garbage)


def loop_spans(kind):
    """[(row, columns)]: the tokens that share a weight."""
    columns = [[t for t in range(VALID.shape[1]) if VALID[row, t]] for row in range(len(VALID))]
    if kind == "token":
        return [(row, [t]) for row, there in enumerate(columns) for t in there]
    if kind == "sequence":
        return [(row, there) for row, there in enumerate(columns) if there]
    return [(row, run) for row, runs in enumerate(RUNS) for run in runs]


def golden_range(text):
    """verl's threshold: a number, or "low_high"."""
    ends = [float(part) for part in str(text).split("_")]
    return (ends[0], ends[1]) if len(ends) == 2 else (None, ends[0])
