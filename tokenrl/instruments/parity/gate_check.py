"""A gate by itself: autograd's derivatives against finite differences, and its Triton function against its torch."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import described, wrong
from ...objectives.gates.base import Gate
from ...ops.backends import BACKENDS
from .tolerance import ULPS, errors

POINTS = 4096
STEP = 1e-6
RELATIVE, ABSOLUTE = 1e-3, 1e-5  # of a derivative, as torch.autograd.gradcheck has them
SMOOTH = 1e-10  # of a value: a second difference that is larger is a kink or a jump
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


def checked_gate(gate: Gate) -> GateReport:
    """Every check of a gate."""
    given = tokens()
    _check_form(gate, given)
    found, kinks = [_by_token(gate, given), *_without_advantage(gate, given)], torch.zeros(POINTS, dtype=torch.bool)
    for name in ("s", "x", "logp"):
        error, at_kinks = _derivative(gate, given, name)
        found.append(error)
        kinks |= at_kinks
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    triton = BACKENDS["triton"]
    reason = triton.why_not(device) or triton.why_not_gate(gate.name)
    if reason is None:
        found += _triton(gate, given, device)
    return GateReport(gate.name, POINTS, int(kinks.sum()), tuple(found), reason)


def _value(gate: Gate, given: dict[str, Tensor], **moved: Tensor) -> Tensor:
    return gate.value(**(given | moved))


def _check_form(gate: Gate, given: dict[str, Tensor]) -> None:
    """Shapes and dtypes of what it returns."""
    single = {name: x.float() for name, x in given.items()}
    value, bounds = gate.value(**single), gate.clipped(**single)
    if not isinstance(value, Tensor) or value.shape != (POINTS,) or value.dtype != torch.float32:
        raise wrong(f"value of {gate.name!r}", described(value), f"a tensor of torch.float32 [{POINTS}], as s is")
    if not isinstance(bounds, tuple) or len(bounds) != 3:
        raise wrong(f"clipped of {gate.name!r}", described(bounds), "three tensors of bool: low, high, dual")
    for bound in bounds:
        if not isinstance(bound, Tensor) or bound.shape != (POINTS,) or bound.dtype != torch.bool:
            raise wrong(f"clipped of {gate.name!r}", described(bound), f"a tensor of torch.bool [{POINTS}]")


def _by_token(gate: Gate, given: dict[str, Tensor]) -> GateError:
    """A token's value depends on no other."""
    whole, order = _value(gate, given), torch.arange(POINTS).flip(0)[: POINTS // 2]
    alone = gate.value(**{name: x[order] for name, x in given.items()})
    allowed = ULPS * torch.finfo(torch.float64).eps * whole.abs().max().item()
    return _worst("value without the other tokens", (whole[order] - alone).abs(), allowed, given, order)


def _without_advantage(gate: Gate, given: dict[str, Tensor]) -> Iterator[GateError]:
    a = given["advantages"]
    if not gate.uses_advantages:
        apart = (_value(gate, given) - _value(gate, given, advantages=-a)).abs()
        yield _worst("value with other advantages", apart, 0.0, given)
    elif gate.vanishes:
        yield _worst("value where A is 0", _value(gate, given, advantages=0 * a).abs(), 0.0, given)


def _gradient(gate: Gate, given: dict[str, Tensor], name: str) -> Tensor:
    leaf = given[name].clone().requires_grad_()
    value = _value(gate, given, **{name: leaf})
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)[0]


def _derivative(gate: Gate, given: dict[str, Tensor], name: str) -> tuple[GateError, Tensor]:
    """Autograd's against central differences, and which tokens are at a kink. One that slopes does not name is 0."""
    found = _gradient(gate, given, name)
    slope = "s" if name == "x" else name
    if slope not in gate.slopes:
        what = f"derivative by {name}, which slopes does not name"
        return _worst(what, found.abs(), 0.0, given), torch.zeros_like(found, dtype=torch.bool)
    above, here, below = (_value(gate, given, **{name: given[name] + step}) for step in (STEP, 0, -STEP))
    kinks = ((above - 2 * here + below).abs() > SMOOTH * here.abs().clamp(min=1)) | ~here.isfinite()
    difference = (above - below) / (2 * STEP)
    allowed = RELATIVE * difference.abs() + ABSOLUTE * here.abs().clamp(min=1)
    error = torch.where(kinks, 0, (found - difference).abs())
    return _worst(f"derivative by {name}", error, allowed, given), kinks


def _worst(
    of: str, error: Tensor, allowed: Tensor | float, given: dict[str, Tensor], order: Tensor | None = None
) -> GateError:
    limits = torch.as_tensor(allowed, dtype=error.dtype).expand_as(error)
    share = torch.where(error > 0, error / limits, 0).nan_to_num(nan=torch.inf)
    at = int(share.argmax())
    token = at if order is None else int(order[at])
    point = {name: x[token].item() for name, x in given.items()} if error[at] > 0 else None
    return GateError(of, error[at].nan_to_num(nan=torch.inf).item(), limits[at].item(), point)


def _triton(gate: Gate, given: dict[str, Tensor], device: torch.device) -> Iterator[GateError]:
    """By the tolerance rule in fp32; d_logp holds the part of x."""
    from ...triton_kernels.gate_values import gate_values

    numbers = [float(parameter) for parameter in gate.params()]
    given = {name: x.float().double() for name, x in given.items()}
    away = ~_near_a_jump(gate, given)
    given = {name: x[away] for name, x in given.items()}
    single = {name: x.float() for name, x in given.items()}
    found = gate_values(gate.name, *(single[name].to(device) for name in ARGUMENTS), numbers).cpu()
    for row, name in enumerate(("value", "d_s", "d_logp")):
        truth, base = (_torch_value(gate, of, name) for of in (given, single))
        norm, error, allowed = max(errors(found[row], truth, base), key=lambda found: found[1] / max(found[2], 1e-300))
        at = int((found[row].double() - truth).abs().argmax())
        point = {key: x[at].item() for key, x in given.items()}
        yield GateError(f"Triton's {name}, {norm}", error, allowed, point if error else None)
    for row, (name, bound) in enumerate(zip(("low", "high", "dual"), gate.clipped(**given), strict=True), start=3):
        yield _worst(f"Triton's {name}", (found[row].double() - bound.double()).abs(), 0.0, given)


def _torch_value(gate: Gate, given: dict[str, Tensor], name: str) -> Tensor:
    if name == "value":
        return _value(gate, given)
    if name == "d_s":
        return _gradient(gate, given, "s")
    return _gradient(gate, given, "logp") + _gradient(gate, given, "x")


def _near_a_jump(gate: Gate, given: dict[str, Tensor]) -> Tensor:
    """Tokens whose side of an edge fp32 may see otherwise."""
    found = torch.zeros_like(given["s"], dtype=torch.bool)
    for name in ("s", "x", "logp"):
        step = 1e-5 * given[name].abs().clamp(min=1)
        moved = [given | {name: given[name] + shift} for shift in (-step, step)]
        below, above = (gate.clipped(**of) for of in moved)
        for one, other in zip(below, above, strict=True):
            found |= one != other
        for of in ("d_s", "d_logp"):
            one, here, other = (_torch_value(gate, at, of) for at in (moved[0], given, moved[1]))
            found |= (one - 2 * here + other).abs() > 1e-3 * here.abs().clamp(min=1e-3)
    return found
