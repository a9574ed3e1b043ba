"""The base of all gates, and what their definitions share. Each gate gives its parameters, its formula, its source,
and its value in torch.

A gate turns the statistic `s` (a log ratio) of one token into that token's loss:

    value(s, x, logp, advantages, t) -> l        differentiable in s, x and logp
    clipped(s, x, logp, advantages, t) -> low, high, dual      which bound is active (bool), for the metrics

x is the token's own log ratio, whose derivative with respect to the own logp is 1 under every flow. t is the position:
the 1-based count of valid tokens in the statistic's span. All arguments broadcast; parameters are
numbers or tensors with one value per token. Derivatives are autograd's here, hand-written in csrc/gates/ and
triton_kernels/gates.py. The kernels' own tensors never hold gradients for parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from ...batch.checks import check_number
from ...errors import wrong

Bound = float | Tensor
Bounds = tuple[Tensor, Tensor, Tensor]  # bool: which tokens are below, above, beyond the dual clip
INF = float("inf")


class Range(NamedTuple):
    """Of a parameter that is a number."""

    least: float = -INF
    above: float = -INF
    most: float = INF


# Of a bound from the middle, or a coefficient; a bound on a ratio; what PPO's dual clip is, above any other bound.
ANY, WIDTH, POSITIVE, DUAL, SHARE = Range(), Range(least=0), Range(above=0), Range(above=1), Range(least=0, most=1)


class Parametrised(Protocol):
    """A gate or a form. ranges: of its parameters, where a number outside has no meaning."""

    names: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]
    ranges: ClassVar[Mapping[str, Range]]
    __dataclass_fields__: ClassVar[dict[str, Any]]


AnyPart = TypeVar("AnyPart", bound=Parametrised)
AnyClass = TypeVar("AnyClass", bound=type)


@dataclass_transform(eq_default=False, frozen_default=True)
def parametrised(cls: AnyClass) -> AnyClass:
    """A frozen dataclass that knows its parameters' names where torch.compile traces (dataclasses.fields does not).

    Args:
        cls: a subclass of tokenrl.Gate, with its parameters as annotated fields.
    """
    made: Any = dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(made)
    made.names = tuple(field.name for field in fields)
    made.words = tuple(field.name for field in fields if field.type in (str, "str"))
    made.optional = tuple(field.name for field in fields if "None" in str(field.type))
    made.ranges = getattr(made, "ranges", {})
    return made


@parametrised
class Gate:
    """Base of all gates. `name` finds the kernels' functor; `params()` are its parameters in the functor's order.

    uses_advantages: the loss depends on them; vanishes: it is then 0, with its gradient, wherever they are 0. slopes:
    in which of s (with it x) and logp it has a derivative. ranges: of parameters that are numbers. reads_rollout:
    importance weights of the rollout are factors of the ratio, not of the loss."""

    name: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]
    ranges: ClassVar[Mapping[str, Range]] = {}
    __dataclass_fields__: ClassVar[dict[str, Any]]  # as dataclasses.replace asks for, to type checkers
    uses_advantages: ClassVar[bool] = True
    vanishes: ClassVar[bool] = True
    slopes: ClassVar[tuple[str, ...]] = ("s",)
    reads_rollout: ClassVar[bool] = False

    def params(self) -> tuple[Bound, ...]:
        return tuple(getattr(self, name) for name in self.names)

    def value(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is no gate: it defines no value")

    def weighed(self, weights: Callable[[], Tensor]) -> "Gate":
        """The gate of tokens whose loss is multiplied by weights() [N], for those that have a part of other weights."""
        return self

    def clipped(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor) -> Bounds:
        never = torch.zeros_like(s, dtype=torch.bool)
        return never, never, never


def as_tensor_like(bound: Bound, x: Tensor) -> Tensor:
    """In the dtype of x and where x is, whatever torch's default device."""
    return torch.as_tensor(bound, dtype=x.dtype, device=x.device)


def clamp(x: Tensor, low: Bound, high: Bound) -> Tensor:
    return torch.minimum(torch.maximum(x, as_tensor_like(low, x)), as_tensor_like(high, x))


def used(factor: Bound, x: Tensor) -> Tensor:
    """x, and 0 where the factor is: 0 times infinity is NaN to torch, in a value as in a gradient."""
    return torch.where(as_tensor_like(factor, x) == 0, 0, x)


def product(a: Bound, b: Tensor) -> Tensor:
    """a b, where a factor a of 0 hides even an infinite b."""
    return a * used(a, b)


def bounded(x: Tensor, low: Bound, high: Bound, ceiling: Bound, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Where max(-A x, -A clip(x)), for A < 0 at most -A ceiling, has no slope, and the bound that x meets there."""
    low, high, ceiling = (as_tensor_like(bound, x) for bound in (low, high, ceiling))
    lower, upper = torch.where(advantages > 0, -INF, low), torch.where(advantages > 0, high, ceiling)
    return (x < lower) | (x > upper) | (advantages == 0), clamp(x, lower, upper).detach()


def surrogate(s: Tensor, low: Bound, high: Bound, ceiling: Bound, advantages: Tensor) -> Tensor:
    """max(-A r, -A clip(r)), and for A < 0 at most -A ceiling (dual clip); r = e^s.

    Out of bounds there is no gradient even where r is infinite: that of torch's maximum is 0 inf."""
    outside, bound = bounded(s.exp(), low, high, ceiling, advantages)
    return product(-advantages, torch.where(outside, bound, torch.where(outside, 0, s).exp()))


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class _EagerStraightThrough(_StraightThrough):
    """With a forward derivative, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, _: Tensor | None, tangent: Tensor) -> Tensor:
        return tangent.clone()


def straight_through(value: Tensor, carrier: Tensor) -> Tensor:
    """The value of one tensor with the derivative of another, infinite or not: value + carrier - sg[carrier]."""
    function = _StraightThrough if torch.compiler.is_compiling() else _EagerStraightThrough
    return function.apply(value.detach(), carrier)


def map_params(gate: AnyPart, change: Callable[[str, Tensor], Tensor]) -> AnyPart:
    """The same gate or form with `change(name, tensor)` applied to each of its tensor parameters."""
    values = {name: getattr(gate, name) for name in gate.names}
    if not any(isinstance(value, Tensor) for value in values.values()):
        return gate
    return type(gate)(**{name: change(name, v) if isinstance(v, Tensor) else v for name, v in values.items()})


def check_params(gate: Parametrised) -> None:
    """Numbers must be numbers, and no parameter may expect a gradient."""
    for name in gate.names:
        value = getattr(gate, name)
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise wrong(name, "a tensor that requires grad", "a constant; bounds carry no gradient, detach it")
        elif name not in gate.words and not (value is None and name in gate.optional):
            _check_range(name, value, gate.ranges.get(name, ANY))


def _check_range(name: str, value: object, range: Range) -> None:
    accepted = "a number"
    if range.most < INF:
        accepted += f" in [{range.least:g}, {range.most:g}]"
    elif range.least > -INF:
        accepted += f", at least {range.least:g},"
    elif range.above > -INF:
        accepted += f" above {range.above:g}"
    accepted += " or a tensor with one value per token"
    check_number(name, value, range.least, range.most, above=range.above, accepted=accepted)
