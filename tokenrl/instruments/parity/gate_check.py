"""A gate by itself: autograd's derivatives against finite differences, and its own kernels against its torch."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import described, wrong
from ...objectives.gates.base import Gate
from .gate_kernels import held_kernel, kernels_of
from .gate_tokens import POINTS, GateError, gradient, tokens, value, worst
from .tolerance import ULPS

STEP = 1e-6
RELATIVE, ABSOLUTE = 1e-3, 1e-5  # of a derivative, as torch.autograd.gradcheck has them
SMOOTH = 1e-10  # of a value: a second difference that is larger is a kink or a jump


@dataclass(frozen=True)
class GateReport:
    """points: tokens. at_kinks: how many of them were left out by one derivative at least. no_triton: why its Triton
    function was not run; None where it was."""

    gate: str
    points: int
    at_kinks: int
    errors: tuple[GateError, ...]
    no_triton: str | None

    @property
    def held(self) -> bool:
        return all(error.held for error in self.errors)


def as_gate(given: Any) -> Gate:
    """A gate, or one of a class with its own parameters."""
    if inspect.isclass(given) and issubclass(given, Gate):
        try:
            given = given()
        except TypeError as error:
            raise wrong("gate", f"{given.__name__}(): {error}", "a class with defaults, or one of its gates") from None
    if not isinstance(given, Gate):
        raise wrong("gate", described(given), "a subclass of tokenrl.Gate, or one of its gates")
    if not isinstance(getattr(given, "name", None), str):
        raise wrong("gate", f"{type(given).__name__} without a name", "name = '...' in the class")
    if any(isinstance(parameter, Tensor) for parameter in given.params()):
        raise wrong("gate", f"{given.name!r} with a tensor for a parameter", "numbers")
    return given


def checked_gate(gate: Gate) -> GateReport:
    """Every check of a gate."""
    given = tokens()
    _check_form(gate, given)
    found, kinks = [_by_token(gate, given), *without_advantage(gate, given)], torch.zeros(POINTS, dtype=torch.bool)
    for name in ("s", "x", "logp"):
        error, at_kinks = _derivative(gate, given, name)
        found.append(error)
        kinks |= at_kinks
    kernels, no_triton = kernels_of(gate)
    for of, values in kernels.items():
        found += held_kernel(of, values, gate, given)
    return GateReport(gate.name, POINTS, int(kinks.sum()), tuple(found), no_triton)


def _check_form(gate: Gate, given: dict[str, Tensor]) -> None:
    """Shapes and dtypes of what it returns."""
    single = {name: x.float() for name, x in given.items()}
    found, bounds = gate.value(**single), gate.clipped(**single)
    if not isinstance(found, Tensor) or found.shape != (POINTS,) or found.dtype != torch.float32:
        raise wrong(f"value of {gate.name!r}", described(found), f"a tensor of torch.float32 [{POINTS}], as s is")
    if not isinstance(bounds, tuple) or len(bounds) != 3:
        raise wrong(f"clipped of {gate.name!r}", described(bounds), "three tensors of bool: low, high, dual")
    for bound in bounds:
        if not isinstance(bound, Tensor) or bound.shape != (POINTS,) or bound.dtype != torch.bool:
            raise wrong(f"clipped of {gate.name!r}", described(bound), f"a tensor of torch.bool [{POINTS}]")


def _by_token(gate: Gate, given: dict[str, Tensor]) -> GateError:
    """A token's value depends on no other."""
    whole, order = value(gate, given), torch.arange(POINTS).flip(0)[: POINTS // 2]
    alone = gate.value(**{name: x[order] for name, x in given.items()})
    allowed = ULPS * torch.finfo(torch.float64).eps * whole.abs().max().item()
    return worst("value without the other tokens", (whole[order] - alone).abs(), allowed, given, order)


def without_advantage(gate: Gate, given: dict[str, Tensor]) -> Iterator[GateError]:
    """Its value where there is none, or with another, as uses_advantages and vanishes have it."""
    a = given["advantages"]
    if not gate.uses_advantages:
        apart = (value(gate, given) - value(gate, given, advantages=-a)).abs()
        yield worst("value with other advantages", apart, 0.0, given)
    elif gate.vanishes:
        yield worst("value where A is 0", value(gate, given, advantages=0 * a).abs(), 0.0, given)


def _derivative(gate: Gate, given: dict[str, Tensor], name: str) -> tuple[GateError, Tensor]:
    """Autograd's against central differences, and which tokens are at a kink. One that slopes does not name is 0."""
    found = gradient(gate, given, name)
    slope = "s" if name == "x" else name
    if slope not in gate.slopes:
        what = f"derivative by {name}, which slopes does not name"
        return worst(what, found.abs(), 0.0, given), torch.zeros_like(found, dtype=torch.bool)
    above, here, below = (value(gate, given, **{name: given[name] + step}) for step in (STEP, 0, -STEP))
    kinks = ((above - 2 * here + below).abs() > SMOOTH * here.abs().clamp(min=1)) | ~here.isfinite()
    difference = (above - below) / (2 * STEP)
    allowed = RELATIVE * difference.abs() + ABSOLUTE * here.abs().clamp(min=1)
    error = torch.where(kinks, 0, (found - difference).abs())
    return worst(f"derivative by {name}", error, allowed, given), kinks
