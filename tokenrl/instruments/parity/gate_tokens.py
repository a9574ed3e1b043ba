"""What a gate gives of single tokens, and the error that is most of what is allowed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...objectives.gates.base import Gate

POINTS = 4096
ARGUMENTS = ("s", "x", "logp", "advantages", "t")


@dataclass(frozen=True)
class GateError:
    """at: the arguments of the token where the error is most of what is allowed."""

    of: str
    error: float
    allowed: float
    at: dict[str, float] | None = None

    @property
    def held(self) -> bool:
        return self.error <= self.allowed


def tokens() -> dict[str, Tensor]:
    """Arguments of a gate, fp64 [POINTS]: log ratios from tight to wide, both signs of advantages and none."""
    g = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(POINTS, generator=g, dtype=torch.float64)

    widths = torch.tensor([1e-3, 0.03, 0.3, 2.0], dtype=torch.float64).repeat(POINTS // 4)
    advantages = torch.where(torch.rand(POINTS, generator=g) < 0.05, 0, normal())
    return {
        "s": normal() * widths, "x": normal() * widths.flip(0), "logp": -normal().abs() * 2 - 0.01,
        "advantages": advantages, "t": torch.randint(1, 65, (POINTS,), generator=g).double(),
    }  # fmt: skip


def value(gate: Gate, given: dict[str, Tensor], **moved: Tensor) -> Tensor:
    return gate.value(**(given | moved))


def gradient(gate: Gate, given: dict[str, Tensor], name: str) -> Tensor:
    leaf = given[name].clone().requires_grad_()
    found = value(gate, given, **{name: leaf})
    if not found.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(found.sum(), leaf, allow_unused=True, materialize_grads=True)[0]


def worst(
    of: str, error: Tensor, allowed: Tensor | float, given: dict[str, Tensor], order: Tensor | None = None
) -> GateError:
    limits = torch.as_tensor(allowed, dtype=error.dtype).expand_as(error)
    share = torch.where(error > 0, error / limits, 0).nan_to_num(nan=torch.inf)
    at = int(share.argmax())
    token = at if order is None else int(order[at])
    point = {name: x[token].item() for name, x in given.items()} if error[at] > 0 else None
    return GateError(of, error[at].nan_to_num(nan=torch.inf).item(), limits[at].item(), point)
