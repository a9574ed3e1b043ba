"""Expressions of one token's numbers, and THE table of the ops that they are made of.

Equal expressions are one object, so that what two results share is computed once. Only a 0, a 1 and what is made of
constants alone is simplified.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch


@dataclass(frozen=True, eq=False)
class Op:
    """A row of the table. triton, cpp: the text, {0} and so on are the inputs. torch: the function, of tensors.
    slope(y, *inputs, *their slopes): the derivative of the result y, by torch's conventions; None: there is none.
    """

    name: str
    triton: str
    cpp: str
    torch: Callable[..., torch.Tensor]
    slope: Callable[..., "Expression"] | None = None
    is_bool: bool = False


@dataclass(frozen=True, eq=False)
class Expression:
    """op: of the table; None: a constant, or a leaf of that name."""

    op: Op | None
    inputs: tuple["Expression", ...]
    constant: float | bool | None
    name: str

    @property
    def is_bool(self) -> bool:
        return isinstance(self.constant, bool) if self.op is None else self.op.is_bool

    def __add__(self, other: "Expression") -> "Expression":
        return other if self is ZERO else self if other is ZERO else made("add", self, other)

    def __sub__(self, other: "Expression") -> "Expression":
        return -other if self is ZERO else self if other is ZERO else made("sub", self, other)

    def __mul__(self, other: "Expression") -> "Expression":
        if self is ZERO or other is ZERO:
            return ZERO
        return other if self is ONE else self if other is ONE else made("mul", self, other)

    def __truediv__(self, other: "Expression") -> "Expression":
        return self if self is ZERO or other is ONE else made("div", self, other)

    def __neg__(self) -> "Expression":
        return self if self is ZERO else made("neg", self)


_KNOWN: WeakValueDictionary[tuple[Any, ...], Expression] = WeakValueDictionary()


def _known(op: Op | None, inputs: tuple[Expression, ...], constant: float | bool | None, name: str) -> Expression:
    key = (op, inputs, type(constant), repr(constant), name)
    found = _KNOWN.get(key)
    if found is None:
        found = _KNOWN[key] = Expression(op, inputs, constant, name)
    return found


def constant(value: float | bool) -> Expression:
    return _known(None, (), value if isinstance(value, bool) else float(value) + 0.0, "")


def leaf(name: str) -> Expression:
    return _known(None, (), None, name)


def made(op: str, *inputs: Expression) -> Expression:
    """An op of the table on these."""
    row = OPS[op]
    if all(x.constant is not None for x in inputs):
        dtype = torch.bool if inputs[0].is_bool else torch.float64
        return constant(row.torch(*(torch.tensor(x.constant, dtype=dtype) for x in inputs)).item())
    return _known(row, inputs, None, "")


ZERO, ONE, TWO = constant(0.0), constant(1.0), constant(2.0)
FALSE = constant(False)


def where(condition: Expression, a: Expression, b: Expression) -> Expression:
    if isinstance(condition.constant, bool):
        return a if condition.constant else b
    return a if a is b else made("where", condition, a, b)


def both(a: Expression, b: Expression) -> Expression:
    if isinstance(a.constant, bool):
        return b if a.constant else FALSE
    return both(b, a) if isinstance(b.constant, bool) else made("and", a, b)


def either(a: Expression, b: Expression) -> Expression:
    return opposite(both(opposite(a), opposite(b))) if FALSE in (a, b) else made("or", a, b)


def opposite(a: Expression) -> Expression:
    return a.inputs[0] if a.op is OPS["not"] else made("not", a)


def _chain(slope: Expression, by: Expression) -> Expression:
    """Their product; what a selection makes 0 is selected after it, and hides even an infinite factor."""
    if slope.op is OPS["where"] and {ZERO, ONE} & {*slope.inputs[1:]}:
        condition, a, b = slope.inputs
        return where(condition, _chain(a, by), _chain(b, by))
    return slope * by


def _smaller(y: Expression, a: Expression, b: Expression, da: Expression, db: Expression) -> Expression:
    """Of a minimum: where both are equal, half of each."""
    return where(made("equal", a, b), (da + db) / TWO, where(made("less", a, b), da, db))


def _larger(y: Expression, a: Expression, b: Expression, da: Expression, db: Expression) -> Expression:
    return where(made("equal", a, b), (da + db) / TWO, where(made("less", b, a), da, db))


def _of_quotient(y: Expression, a: Expression, b: Expression, da: Expression, db: Expression) -> Expression:
    return (da - _chain(db, y)) / b


_TRUTH = "select({}, T(1), T(0))"  # in C++ truths are numbers: loops over several bools do not vectorise

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("add", "{0} + {1}", "{0} + {1}", torch.add, lambda y, a, b, da, db: da + db),
        Op("sub", "{0} - {1}", "{0} - {1}", torch.sub, lambda y, a, b, da, db: da - db),
        Op("mul", "{0} * {1}", "{0} * {1}", torch.mul, lambda y, a, b, da, db: _chain(da, b) + _chain(db, a)),
        Op("div", "{0} / {1}", "{0} / {1}", torch.div, _of_quotient),
        Op("neg", "-{0}", "-{0}", torch.neg, lambda y, x, dx: -dx),
        Op("exp", "exponential({0})", "exponential({0})", torch.exp, lambda y, x, dx: _chain(dx, y)),
        Op("expm1", "expm1_of({0})", "expm1_of({0})", torch.expm1, lambda y, x, dx: _chain(dx, y + ONE)),
        Op("log", "tl.log({0})", "log_of({0})", torch.log, lambda y, x, dx: _chain(dx, ONE / x)),
        Op("log1p", "log1p_of({0})", "log1p_of({0})", torch.log1p, lambda y, x, dx: _chain(dx, ONE / (x + ONE))),
        Op("sigmoid", "sigmoid_of({0})", "sigmoid_of({0})", torch.sigmoid, lambda y, x, dx: _chain(dx, y * (ONE - y))),
        Op("tanh", "tanh({0})", "hyperbolic_tangent({0})", torch.tanh, lambda y, x, dx: _chain(dx, ONE - y * y)),
        Op("sqrt", "sqrt_of({0})", "sqrt_of({0})", torch.sqrt, lambda y, x, dx: _chain(dx, ONE / (TWO * y))),
        Op("abs", "tl.abs({0})", "larger({0}, -{0})", torch.abs, lambda y, x, dx: _chain(dx, made("sign", x))),
        Op("sign", "sign_of({0})", "sign_of({0})", torch.sign),
        Op("minimum", "smaller({0}, {1})", "smaller({0}, {1})", torch.minimum, _smaller),
        Op("maximum", "larger({0}, {1})", "larger({0}, {1})", torch.maximum, _larger),
        # clamp's two halves: on the bound itself all of the slope is that of x.
        Op("at_most", "smaller({0}, {1})", "smaller({0}, {1})", torch.minimum,
           lambda y, x, bound, dx, d_bound: where(made("less", bound, x), d_bound, dx)),
        Op("at_least", "larger({0}, {1})", "larger({0}, {1})", torch.maximum,
           lambda y, x, bound, dx, d_bound: where(made("less", x, bound), d_bound, dx)),
        Op("power_of_count", "power({0}, {1})", "power({0}, {1})", torch.pow),  # of t, which has no slope
        Op("detach", "{0}", "{0}", torch.detach),
        Op("where", "tl.where({0}, {1}, {2})", "select({0} != 0, {1}, {2})", torch.where,
           lambda y, c, a, b, dc, da, db: where(c, da, db)),
        Op("less", "{0} < {1}", _TRUTH.format("{0} < {1}"), torch.lt, is_bool=True),
        Op("less_equal", "{0} <= {1}", _TRUTH.format("{0} <= {1}"), torch.le, is_bool=True),
        Op("equal", "{0} == {1}", _TRUTH.format("{0} == {1}"), torch.eq, is_bool=True),
        Op("not_equal", "{0} != {1}", _TRUTH.format("{0} != {1}"), torch.ne, is_bool=True),
        Op("and", "{0} & {1}", "{0} * {1}", torch.logical_and, is_bool=True),
        Op("or", "{0} | {1}", "larger({0}, {1})", torch.logical_or, is_bool=True),
        Op("not", "{0} == 0", "1 - {0}", torch.logical_not, is_bool=True),
    )
}  # fmt: skip


def slope(of: Expression, by: Expression, known: dict[Expression, Expression] | None = None) -> Expression:
    """The partial derivative. known: those of expressions that were met before."""
    known = {} if known is None else known
    if of not in known:
        if of.op is None or of.op.slope is None:
            known[of] = ONE if of is by else ZERO
        else:
            slopes = [slope(x, by, known) for x in of.inputs]
            known[of] = ZERO if all(d is ZERO for d in slopes) else of.op.slope(of, *of.inputs, *slopes)
    return known[of]


def without_detach(of: Expression, known: dict[Expression, Expression] | None = None) -> Expression:
    """The same number, where no slope is asked for any more."""
    known = {} if known is None else known
    if of not in known:
        inputs = [without_detach(x, known) for x in of.inputs]
        stopped = of.op is not None and of.op.name == "detach"
        known[of] = inputs[0] if stopped else of if of.op is None else made(of.op.name, *inputs)
    return known[of]


def in_order(results: Iterable[Expression]) -> Iterator[Expression]:
    """What the results are made of, each once, after what it is made of itself."""
    met: set[Expression] = set()

    def visit(x: Expression) -> Iterator[Expression]:
        if x not in met:
            met.add(x)
            for inner in x.inputs:
                yield from visit(inner)
            yield x

    for result in results:
        yield from visit(result)
