"""Numbers that all ranks draw alike, and what holds them to one process."""

import torch

TOLERANCE = 1e-12


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=3):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def held(truth, found):
    """Relative to the largest number of each."""
    errors = [((x - y).abs().max() / x.abs().max()).item() for x, y in zip(truth, found, strict=True)]
    assert max(errors) < TOLERANCE, errors


def part(x, group, dim=0):
    """This rank's, of equal ones."""
    return x.chunk(group.size(), dim)[group.rank()].clone()


def weighed(logp, entropy):
    """A loss whose gradients differ from token to token."""
    return (logp * normal(*logp.shape, seed=5)).sum() + (entropy * normal(*entropy.shape, seed=6)).sum()
