"""Twelve rewards in ragged groups, and how advantages are compared."""

import torch

# ragged groups: ids neither contiguous nor adjacent, one group of one, one of equal rewards, a shared maximum
IDS = [7, -3, 7, 40, 7, -3, 9, 9, 9, -3, 5, 5]
REWARDS = [0.5, 1.0, -0.25, 3.0, 2.0, 1.0, 0.1, 0.1, 0.1, 0.25, 0.0, 1.0]
LENGTHS = [3, 1, 4, 2, 5, 2, 1, 1, 6, 3, 0, 2]


def same(found, expected, rtol=1e-12):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol)


def of(x):
    return torch.tensor(x, dtype=torch.float64)


def members(i):
    return [j for j, g in enumerate(IDS) if g == IDS[i]]
