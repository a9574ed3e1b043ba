"""The tokens of highest entropy: the threshold is the quantile, and ties."""

import itertools
import math

import pytest
import torch
from golden_data import near
from rollout_cases import VALID, batch

from tokenrl import corrections as cor


@pytest.mark.parametrize("quantile", [0.01, 0.2, 0.3, 0.5, 0.7, 0.77, 1.0])
def test_entropy_threshold_is_the_quantile(quantile):
    for seed, dtype in itertools.product(range(5), (torch.float32, torch.float64)):
        entropy = torch.where(VALID, batch(seed)[0].exp(), math.nan).to(dtype)
        found = cor.entropy_threshold(entropy, quantile, VALID)
        values = sorted(entropy[VALID].double().tolist())
        place = (1 - quantile) * (len(values) - 1)
        below = math.floor(place + 1e-9)
        above = values[min(below + 1, len(values) - 1)]
        expected = values[below] + max(place - below, 0) * (above - values[below])
        near(found, torch.tensor(expected, dtype=torch.float64), "threshold")
        near(found, torch.quantile(entropy[VALID].double(), 1 - quantile), "torch.quantile")
        kept = cor.top_entropy_mask(entropy, quantile=quantile, mask=VALID)
        # As many as lie at or above the place, whatever the rounding of 1 - quantile.
        assert kept[~VALID].logical_not().all()
        assert kept.sum() == len(values) - math.ceil(place - 1e-9)


def test_ties_are_kept_and_quantile_one_keeps_all():
    entropy = torch.tensor([[0.1, 2.0, 2.0, 2.0, 0.3]])
    assert cor.top_entropy_mask(entropy).tolist() == [[False, True, True, True, False]]
    assert cor.top_entropy_mask(entropy, quantile=1.0).all()
    steps = torch.arange(11.0)[None]
    assert cor.top_entropy_mask(steps, quantile=0.7).sum() == 8, "1 - 0.7 is a little more than 0.3"
