"""Correctness before speed: a backend's values and gradients against the fp64 reference, by tokenrl.parity."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenrl import parity

from .case import Case


@dataclass(frozen=True)
class Verdict:
    """reason: why the results are wrong, or None. value, gradient: error over the error of the reference in the same
    precision (L2), None where the reference has none."""

    reason: str | None
    value: float | None
    gradient: float | None


@dataclass(frozen=True)
class Truth:
    """Results and gradients of the fp64 reference, and those of the reference in the case's precision."""

    exact: tuple[Tensor, ...]
    base: tuple[Tensor, ...]


def results(call, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...], leaves: int) -> tuple[Tensor, ...]:
    """The results and the gradients of the first inputs, `leaves` of them."""
    outputs = call(*inputs)
    flow = [c.to(o.dtype).view(o.shape) for c, o in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, inputs[:leaves], flow)
    return *(o.detach() for o in outputs), *gradients


def truth(case: Case) -> Truth:
    """Of the checked rows only: that of all rows would not fit."""
    inputs = tuple(case.checked(x.detach()) for x in case.inputs)
    cotangents = tuple(case.checked(c) for c in case.cotangents)
    found = []
    for precision in (torch.float64, None):
        cast = [x.to(precision) if precision and x.is_floating_point() else x for x in inputs]
        cast[: case.leaves] = [x.detach().requires_grad_() for x in cast[: case.leaves]]
        found.append(results(functools.partial(case.run, "reference"), tuple(cast), cotangents, case.leaves))
    return Truth(*found)


def ratio(error: float, base: float) -> float | None:
    return error / base if base else None


def errors_over_base(found: tuple[Tensor, ...], against: Truth) -> list[float | None]:
    """The L2 error of each result over that of the reference in the same precision."""
    norms = [
        [torch.linalg.vector_norm(x.double() - exact).item() for x in (one, base)]
        for one, exact, base in zip(found, against.exact, against.base, strict=True)
    ]
    return [ratio(*pair) for pair in norms]


def largest(ratios: list[float | None]) -> float | None:
    return max((r for r in ratios if r is not None), default=None)


def verdict(case: Case, call, against: Truth, strict: bool = True) -> Verdict:
    """Runs call on the whole case and compares the checked rows. strict: hold it to the tolerance rule."""
    found = tuple(case.checked(x) for x in results(call, case.inputs, case.cotangents, case.leaves))
    values = len(found) - case.leaves
    reason = None
    for number, (one, exact, base) in enumerate(zip(found, against.exact, against.base, strict=True)):
        what = f"value {number}" if number < values else f"gradient {number - values}"
        try:
            if strict:
                parity.close(one, exact, base, what)
        except AssertionError as error:
            reason = reason or " ".join(str(error).split())[:200]
    ratios = errors_over_base(found, against)
    return Verdict(reason, largest(ratios[:values]), largest(ratios[values:]))
