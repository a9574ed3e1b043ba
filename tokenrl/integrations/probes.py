"""What hosts presume of a loss and not every row grants, found by trying the row on a few sequences."""

from functools import cache

import torch
from torch import Tensor

from ..losses.policy import policy_loss
from ..objectives.policy import Objective


def _gradient(row: Objective, scale: Tensor, rows: slice) -> Tensor:
    """d (the sum over the tokens) / d logp of some of six sequences. scale: [6, 1], of the advantages."""
    g = torch.Generator().manual_seed(0)
    old, x, a = torch.randn(3, 6, 40, generator=g, dtype=torch.float64).unbind()
    old, advantages = -2 * old.abs(), 3 * a[:, :1] * scale
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some rows draw
        logp = (x + old)[rows].requires_grad_()
        loss, _ = policy_loss(row, logp, old[rows], advantages.expand_as(x)[rows], aggregation="token-sum")
        return torch.autograd.grad(loss, logp)[0]


@cache
def scales_with_advantages(row: Objective) -> bool:
    """Whether the gradient of advantages c A is c times that of A for any c > 0, one per sequence."""
    scale = torch.linspace(0.2, 3, 6, dtype=torch.float64)[:, None]
    every, one = slice(None), torch.ones_like(scale)
    return torch.allclose(_gradient(row, scale, every), scale * _gradient(row, one, every), rtol=1e-9, atol=1e-12)


@cache
def adds_up_over_sequences(row: Objective) -> bool:
    """Whether the loss of a batch is the sum of those of its sequences, each by itself."""
    one = torch.ones(6, 1, dtype=torch.float64)
    parts = torch.cat([_gradient(row, one, slice(i, i + 1)) for i in range(6)])
    return torch.allclose(_gradient(row, one, slice(None)), parts, rtol=1e-9, atol=1e-12)
