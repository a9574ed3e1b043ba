"""What a gate computes of a token, read off its torch: each op that runs on a few numbers becomes an expression."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import described, wrong
from ..objectives.gates.base import Gate
from .aten import TRANSLATED, Refused, cast
from .expressions import FALSE, ZERO, Expression, constant, leaf, made, slope, where, without_detach

ARGUMENTS = ("s", "x", "logp", "advantages", "t")
TOKENS = 3  # of the numbers on which it runs: a result of another shape depends on other tokens
_NOT_USERS = (Path(torch.__file__).parent, Path(__file__).parent)


@dataclass(frozen=True)
class Traced:
    """A gate as expressions of the leaves ARGUMENTS and parameters. d_logp holds the part of x."""

    gate: str
    parameters: tuple[str, ...]
    value: Expression
    d_s: Expression
    d_logp: Expression
    low: Expression
    high: Expression
    dual: Expression

    @property
    def results(self) -> dict[str, Expression]:
        return {name: getattr(self, name) for name in ("value", "d_s", "d_logp", "low", "high", "dual")}


def traced(gate: Gate) -> Traced:
    """Its value with the partials, and its bounds."""
    _check_parameters(gate)
    value, *bounds = _results(gate)
    _check_derivative(gate)
    silent = made("equal", leaf("advantages"), ZERO) if gate.uses_advantages and gate.vanishes else FALSE
    d_s, d_x, d_logp = (slope(value, leaf(name)) for name in ("s", "x", "logp"))
    numbers = (where(silent, ZERO, without_detach(of)) for of in (value, d_s, d_logp + d_x))
    return Traced(gate.name, type(gate).names, *numbers, *map(without_detach, bounds))


def _check_parameters(gate: Gate) -> None:
    cls = type(gate)
    if cls.params is not Gate.params or cls.words or cls.optional:
        accepted = "a gate whose parameters are numbers alone, and its kernels' too"
        raise wrong("gate", f"{cls.__name__}, whose params() are not just its fields", accepted)


def _given(gate: Gate) -> tuple[dict[str, Tensor], Gate]:
    """Numbers for its arguments, and the gate with tensors of numbers for its parameters."""

    def numbers() -> Tensor:
        return torch.ones(TOKENS, dtype=torch.float64)

    return {name: numbers() for name in ARGUMENTS}, type(gate)(**{name: numbers() for name in gate.names})


def _check_derivative(gate: Gate) -> None:
    """A trace sees what is computed, and not that its derivative is declared to be another."""
    given, free = _given(gate)
    value = free.value(**{k: v.requires_grad_() if k in ("s", "x", "logp") else v for k, v in given.items()})
    nodes, met = [getattr(value, "grad_fn", None)], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            name = type(node).__name__.removesuffix("Backward")
            accepted = "torch's own derivatives; value + carrier - carrier.detach() has the slope of another"
            raise wrong(f"value of {gate.name!r}", f"the autograd.Function {name}", accepted)
        nodes += [following for following, _ in node.next_functions]


def _results(gate: Gate) -> list[Expression]:
    """value, low, high, dual."""
    given, free = _given(gate)
    parameters = {name: getattr(free, name) for name in gate.names}
    tracer = Tracer({**given, **parameters})
    with torch.no_grad():
        value = tracer.result(f"value of {gate.name!r}", lambda: free.value(**given))
        bounds = tracer.result(f"clipped of {gate.name!r}", lambda: free.clipped(**given))
    return [*value, *bounds]


_WORDS = {"_local_scalar_dense": "a number out of a tensor (if, float() or item())", "_to_copy": "a cast"}
_ACCEPTED = ", ".join(name for name in TRANSLATED if not name.startswith(("_", "bitwise", "logical", "lift", "scalar")))
_IGNORED = ("layout", "device", "pin_memory", "memory_format", "non_blocking")  # of an op's arguments


class Tracer(TorchDispatchMode):
    """Runs what it sees and writes down the expression of each result. leaves: by name, tensors [TOKENS]."""

    def __init__(self, leaves: dict[str, Tensor]):
        super().__init__()
        self._what = ""
        self._kept: list[Tensor] = []  # for as long as their numbers are their names
        self._of: dict[int, Expression] = {}
        for name, x in leaves.items():
            self._keep(x, leaf(name))

    def result(self, what: str, run: Callable[[], Any]) -> list[Expression]:
        """Of a tensor, or of each of several. what: for errors."""
        self._what = what
        with self:
            found = run()
        return [self._expression(x) for x in (found if isinstance(found, tuple) else (found,))]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Tensor:
        name = func.overloadpacket.__name__
        given = {k: v for k, v in (kwargs or {}).items() if k not in _IGNORED and v is not None}
        if name not in ("_to_copy", "zeros_like", "ones_like"):
            given.pop("dtype", None)
        try:
            if name not in TRANSLATED:
                raise Refused(_WORDS.get(name, f"torch.{name}"))
            found = self._translated(name, args, given)
        except Refused as error:
            raise wrong(self._what, f"{error}{_place()}", _ACCEPTED) from None
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or out.shape not in ((), (TOKENS,)):
            raise wrong(self._what, f"{described(out)}{_place()}", "what has one value per token")
        self._keep(out, found)
        return out

    def _translated(self, name: str, args: tuple, given: dict[str, Any]) -> Expression:
        dtype = given.pop("dtype", None)
        inputs = [None if x is None else self._expression(x) for x in args]
        named = {k: self._expression(v) for k, v in given.items()}
        if dtype is None:
            return TRANSLATED[name](*inputs, **named)
        return cast(TRANSLATED[name](*inputs, **named), dtype=dtype)

    def _keep(self, x: Tensor, expression: Expression) -> None:
        self._kept.append(x)
        self._of[id(x)] = expression

    def _expression(self, x: Any) -> Expression:
        if isinstance(x, (bool, int, float)):
            return constant(x)
        if not isinstance(x, Tensor):
            raise wrong(self._what, f"{described(x)}{_place()}", "tensors and numbers")
        if id(x) in self._of:
            return self._of[id(x)]
        if x.dim():
            raise wrong(self._what, f"{described(x)} from elsewhere{_place()}", "its arguments and parameters")
        return constant(x.item())


def _place() -> str:
    """The line of the user's that is running."""
    for frame in reversed(traceback.extract_stack()):
        if not any(Path(frame.filename).is_relative_to(folder) for folder in _NOT_USERS):
            return f" in line {frame.lineno} of {Path(frame.filename).name}: {frame.line}"
    return ""
