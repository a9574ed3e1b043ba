"""A traced gate as source: a function as those of triton_kernels/gates.py, a functor as those of csrc/gates/."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from .expressions import Expression, Op, in_order, leaf, made
from .trace import Traced


@dataclass(frozen=True)
class Language:
    """How an op, a leaf and a constant are spelled, and a statement with a name and what it stands for. blocks: whether
    constants are statements too. given: what the caller has computed already."""

    op: Callable[[Op], str]
    leaf: Callable[[str, bool], str]
    constant: Callable[[float | bool], str]
    statement: str
    blocks: bool
    given: dict[Expression, str]


def _triton_constant(value: float | bool) -> str:
    if isinstance(value, bool):
        return str(value)
    # A block: a number alone would be rounded to fp32, and the interpreter compares none with a block.
    return f"zero + {value!r}" if math.isfinite(value) else f'zero + float("{value}")'


def _cpp_constant(value: float | bool) -> str:
    if isinstance(value, bool) or math.isfinite(value):
        return f"T({float(value)!r})"
    if math.isnan(value):
        return "std::numeric_limits<T>::quiet_NaN()"
    return "infinity<T>()" if value > 0 else "-infinity<T>()"


def parameter(name: str) -> str:
    """Like no keyword and no other name of the sources."""
    return f"{name}_"


_TRITON_LEAVES = {"advantages": "advantage"}
_CPP_LEAVES = {"advantages": "in.advantage", "t": "in.t_power"}
TRITON = Language(
    lambda op: op.triton,
    lambda name, given: parameter(name) if given else _TRITON_LEAVES.get(name, name),
    _triton_constant,
    "    {} = {}\n",
    blocks=True,
    given={},
)
CPP = Language(
    lambda op: op.cpp,
    lambda name, given: f"params.{parameter(name)}" if given else _CPP_LEAVES.get(name, f"in.{name}"),
    _cpp_constant,
    "    const T {} = {};\n",
    blocks=False,
    given={made("exp", leaf("s")): "in.ratio"},
)


def _written(gate: Traced, language: Language) -> tuple[str, dict[str, str]]:
    """The statements, and how each result is called after them."""
    names: dict[Expression, str] = {}
    text = ""
    for x in in_order(gate.results.values()):
        if x in language.given:
            spelled = language.given[x]
        elif x.op is not None:
            spelled = language.op(x.op).format(*(names[of] for of in x.inputs))
        elif x.constant is not None:
            spelled = language.constant(x.constant)
        else:
            spelled = language.leaf(x.name, x.name in gate.parameters)
        if x.op is None and not (language.blocks and type(x.constant) is float):
            names[x] = spelled
            continue
        names[x] = f"v{text.count(chr(10))}"
        text += language.statement.format(names[x], spelled)
    return text, {name: names[x] for name, x in gate.results.items()}


def reads_position(gate: Traced) -> bool:
    return any(x.name == "t" for x in in_order(gate.results.values()))


def triton_source(gate: Traced) -> str:
    """A module with one function, `gate`."""
    body, results = _written(gate, TRITON)
    called = sorted({name for name in re.findall(r"(?<![\w.])([a-z]\w*)\(", body) if name != "float"})
    imported = f"from tokenrl.triton_kernels.fused_functions import {', '.join(called)}\n" if called else ""
    arguments = ", ".join(["s", "x", "logp", "advantage", "t", *map(parameter, gate.parameters)])
    return (
        f'"""The gate {gate.gate!r}, as tokenrl.fuse read it off its torch."""\n\n'
        f"import triton\nimport triton.language as tl\n{imported}\n\n"
        f"@triton.jit\ndef gate({arguments}):\n    zero = tl.zeros_like(s)\n{body}"
        f"    return {', '.join(results.values())}\n"
    )


def cpp_source(gate: Traced) -> str:
    """A header with one functor, tokenrl::fused::Gate."""
    body, results = _written(gate, CPP)
    parameters = f"    T {', '.join(map(parameter, gate.parameters))};\n" if gate.parameters else ""
    given = "".join(f"    out.{name} = {result};\n" for name, result in results.items())
    return (
        f"// The gate {gate.gate!r}, as tokenrl.fuse read it off its torch.\n#pragma once\n\n"
        "namespace tokenrl::fused {\n\nstruct Gate {\n"
        f'  static constexpr const char* name = "{gate.gate}";\n'
        f"  static constexpr bool positional = {str(reads_position(gate)).lower()};\n"
        f"  static constexpr int num_params = {len(gate.parameters)};\n"
        f"  template <class T>\n  struct Params {{\n{parameters}"
        "    static constexpr T power = 1;  // of t, where the gate is positional\n  };\n"
        "  template <class T>\n"
        "  TRL_HD static Gated<T> eval(const GateInput<T>& in, [[maybe_unused]] const Params<T>& params) {\n"
        f"    Gated<T> out;\n{body}{given}    return out;\n  }}\n}};\n\n}}  // namespace tokenrl::fused\n"
    )
