"""A gate's kernels on single tokens, held to its torch value and autograd by the tolerance rule."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...objectives.gates.base import Gate
from ...ops.backends import BACKENDS, CPU_GATES, TRITON_GATES
from .gate_tokens import ARGUMENTS, GateError, gradient, value, worst
from .tolerance import errors

Values = Callable[..., Tensor]  # (s, x, logp, advantages, t, parameters) -> value, d_s, d_logp, low, high, dual: [6, N]


def kernels_of(gate: Gate) -> tuple[dict[str, Values], str | None]:
    """Those of its own that can run here, and why its Triton function cannot, or None."""
    found = {} if (fused := CPU_GATES.get(gate.name)) is None else {"C++": fused}
    device = triton_device()
    triton = BACKENDS["triton"]
    reason = triton.why_not(device) or triton.why_not_gate(gate.name)
    if reason is None:
        found["Triton"] = triton_values(TRITON_GATES[gate.name])
    return found, reason


def triton_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def triton_values(function: Callable) -> Values:
    """Of a Triton function, on the GPU where there is one."""

    def values(*given: Tensor | list[float]) -> Tensor:
        from ...triton_kernels.gate_values import gate_values

        there = (x.to(triton_device()) if isinstance(x, Tensor) else x for x in given)
        return gate_values(function, *there).cpu()

    return values


def held_kernel(
    of: str, values: Values, gate: Gate, given: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> Iterator[GateError]:
    """On tokens away from the edges, whose side rounding decides. of: the kernel, for the report."""
    given = {name: x.to(dtype).double() for name, x in given.items()}
    away = ~_near_a_jump(gate, given)
    return _held(of, values, gate, {name: x[away] for name, x in given.items()}, dtype)


def held_at_edges(of: str, values: Values, gate: Gate, dtype: torch.dtype) -> Iterator[GateError]:
    """Where ratios are 1, or beyond what training sees, and advantages are 0: by torch's conventions."""
    for size in (0.125, 20.0):
        axes = ((-size, 0.0, size), (-size, 0.0, size), (-20.0, -1.0, 0.0), (-1.0, 0.0, 1.0), (1.0, 2.0, 1000.0))
        grid = torch.cartesian_prod(*(torch.tensor(axis, dtype=torch.float64) for axis in axes))
        given = dict(zip(ARGUMENTS, grid.T.contiguous(), strict=True))
        yield from _held(f"{of} at edges", values, gate, given, dtype)


def _held(of: str, values: Values, gate: Gate, given: dict[str, Tensor], dtype: torch.dtype) -> Iterator[GateError]:
    """d_logp holds the part of x."""
    inputs = {name: x.to(dtype) for name, x in given.items()}
    found = values(*(inputs[name] for name in ARGUMENTS), [float(parameter) for parameter in gate.params()])
    exact = _exact(gate)
    for row, name in enumerate(("value", "d_s", "d_logp")):
        truth = _torch_value(exact, given, name)
        base = truth if dtype == torch.float64 else _torch_value(gate, inputs, name)
        norm, error, allowed = max(errors(found[row], truth, base), key=lambda found: found[1] / max(found[2], 1e-300))
        at = int((found[row].double() - truth).abs().argmax())
        point = {key: x[at].item() for key, x in given.items()}
        yield GateError(f"{of}'s {name}, {norm}", error, allowed, point if error else None)
    for row, (name, bound) in enumerate(zip(("low", "high", "dual"), gate.clipped(**given), strict=True), start=3):
        yield worst(f"{of}'s {name}", (found[row].double() - bound.double()).abs(), 0.0, given)


def _exact(gate: Gate) -> Gate:
    """With numbers in fp64: torch makes fp32 of where(condition, 0.1, 0.2)."""
    numbers = {name: getattr(gate, name) for name in gate.names if type(getattr(gate, name)) is float}
    return replace(gate, **{name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()})


def _torch_value(gate: Gate, given: dict[str, Tensor], name: str) -> Tensor:
    if name == "value":
        return value(gate, given)
    if name == "d_s":
        return gradient(gate, given, "s")
    return gradient(gate, given, "logp") + gradient(gate, given, "x")


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
