"""What each op of torch is in expressions: THE list of what a gate may compute."""

from collections.abc import Callable
from functools import reduce

import torch

from .expressions import FALSE, ONE, ZERO, Expression, both, either, in_order, leaf, made, opposite, where


class Refused(Exception):
    """What has no expression."""


def _number(x: Expression) -> Expression:
    return where(x, ONE, ZERO) if x.is_bool else x


def _truth(x: Expression) -> Expression:
    return x if x.is_bool else made("not_equal", x, ZERO)


def _of_numbers(op: str) -> Callable[..., Expression]:
    return lambda *inputs: made(op, *map(_number, inputs))


def _extreme(op: str, a: Expression, b: Expression) -> Expression:
    """The kernels' first argument wins where a NaN is compared: what the log-probs are in comes first."""
    a, b = sorted(map(_number, (a, b)), key=lambda x: not {*map(leaf, ("s", "x", "logp"))} & {*in_order([x])})
    return made(op, a, b)


def _compared(op: str, a: Expression, b: Expression) -> Expression:
    return made(op, a, b) if a.is_bool and b.is_bool else made(op, _number(a), _number(b))


def _chosen(condition: Expression, a: Expression, b: Expression) -> Expression:
    if a.is_bool and b.is_bool:
        return either(both(condition, a), both(opposite(condition), b))
    return where(condition, _number(a), _number(b))


def _clamp(x: Expression, least: Expression | None = None, most: Expression | None = None) -> Expression:
    x = x if least is None else made("at_least", x, least)
    return x if most is None else made("at_most", x, most)


def _power(x: Expression, exponent: Expression) -> Expression:
    """By a number of halves: products and a root."""
    if x is leaf("t"):
        return made("sqrt", x) if exponent.constant == 0.5 else made("power_of_count", x, exponent)
    if exponent.constant is None:
        raise Refused("a power by what is no number")
    halves = abs(2 * exponent.constant)
    if halves > 32 or halves != int(halves):
        raise Refused(f"the power {exponent.constant:g}")
    factors = [x] * (int(halves) // 2) + [made("sqrt", x)] * (int(halves) % 2)
    whole = reduce(lambda a, b: a * b, factors, ONE)
    return ONE / whole if exponent.constant < 0 else whole


def _softplus(x: Expression, beta: Expression = ONE, threshold: Expression = ONE) -> Expression:
    z = x * beta
    return (made("maximum", z, ZERO) + made("log1p", made("exp", -made("abs", z)))) / beta


def cast(x: Expression, *, dtype: torch.dtype | None = None) -> Expression:
    if dtype in (None, torch.float64):
        return _number(x)
    if dtype == torch.bool:
        return _truth(x)
    raise Refused(f"a cast to {dtype}")


# By the name of the aten op. Those that bear a name of the table are its own.
TRANSLATED: dict[str, Callable[..., Expression]] = {
    "add": lambda a, b, alpha=ONE: _number(a) + alpha * _number(b),
    "sub": lambda a, b, alpha=ONE: _number(a) - alpha * _number(b),
    "rsub": lambda a, b, alpha=ONE: _number(b) - alpha * _number(a),
    "mul": lambda a, b: _number(a) * _number(b),
    "div": lambda a, b: _number(a) / _number(b),
    "neg": lambda x: -x,
    "reciprocal": lambda x: ONE / x,
    "rsqrt": lambda x: ONE / made("sqrt", x),
    "square": lambda x: x * x,
    "pow": _power,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda x, most: _clamp(x, None, most),
    "relu": lambda x: where(made("less_equal", x, ZERO), ZERO, x),
    "softplus": _softplus,
    "sgn": _of_numbers("sign"),
    "where": _chosen,
    "masked_fill": lambda x, condition, value: _chosen(condition, value, x),
    "lt": lambda a, b: made("less", _number(a), _number(b)),
    "gt": lambda a, b: made("less", _number(b), _number(a)),
    "le": lambda a, b: made("less_equal", _number(a), _number(b)),
    "ge": lambda a, b: made("less_equal", _number(b), _number(a)),
    "eq": lambda a, b: _compared("equal", a, b),
    "ne": lambda a, b: _compared("not_equal", a, b),
    "isnan": lambda x: made("not_equal", x, x),
    **{f"{kind}_and": lambda a, b: both(_truth(a), _truth(b)) for kind in ("bitwise", "logical")},
    **{f"{kind}_or": lambda a, b: either(_truth(a), _truth(b)) for kind in ("bitwise", "logical")},
    **{f"{kind}_not": lambda x: opposite(_truth(x)) for kind in ("bitwise", "logical")},
    **{f"{kind}_xor": lambda a, b: made("not_equal", _truth(a), _truth(b)) for kind in ("bitwise", "logical")},
    "zeros_like": lambda x: FALSE if x.is_bool else ZERO,
    "ones_like": lambda x: opposite(FALSE) if x.is_bool else ONE,
    "full_like": lambda x, value: value,
    "scalar_tensor": lambda value: value,
    "clone": lambda x: x,
    "lift_fresh": lambda x: x,
    "_to_copy": cast,
    "detach": lambda x: made("detach", x),
    **{op: _of_numbers(op) for op in (
        "exp", "expm1", "log", "log1p", "sigmoid", "tanh", "sqrt", "abs", "sign",
    )},
    "minimum": lambda a, b: _extreme("minimum", a, b),
    "maximum": lambda a, b: _extreme("maximum", a, b),
}  # fmt: skip
