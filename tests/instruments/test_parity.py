"""Canaries: the tolerance rule must reject a gradient that is wrong in any of the usual ways."""

import pytest
import torch

from tokenrl.instruments.parity import close


def one_token_wrong(g):
    wrong = g.clone()
    wrong[g.numel() // 2] += g.abs().max() * 1e-4
    return wrong


MUTATIONS = {
    "zeroed": torch.zeros_like,
    "sign-flipped": torch.neg,
    "shifted": lambda g: g.roll(1),
    "one token wrong": one_token_wrong,
    "one token missing": lambda g: torch.where(torch.arange(g.numel()) == g.abs().argmin(), 0, g),
    "scaled": lambda g: g * 1.001,
    "not a number": lambda g: torch.where(torch.arange(g.numel()) == 3, torch.nan, g),
}


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_an_honest_kernel_passes(scale):
    truth = torch.randn(257, dtype=torch.float64) * scale
    base = truth.float()
    close(base * (1 + 1e-7), truth, base)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_gradient_fails(name, scale):
    truth = (torch.randn(257, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3) * scale
    base = truth.float()
    with pytest.raises(AssertionError):
        close(MUTATIONS[name](base), truth, base)
