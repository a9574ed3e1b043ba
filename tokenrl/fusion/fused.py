"""tokenrl.fuse."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..errors import wrong
from ..instruments.parity.gate_check import as_gate, without_advantage
from ..instruments.parity.gate_kernels import Values, held_at_edges, held_kernel, triton_device, triton_values
from ..instruments.parity.gate_tokens import tokens
from ..objectives.gates import GATES, MAX_PARAMS
from ..objectives.gates.base import Gate
from ..ops import backends
from . import building, writing
from .trace import Traced, traced

AnyGate = TypeVar("AnyGate", bound=type[Gate])


def fuse(gate: AnyGate) -> AnyGate:
    """Makes kernels of a gate of your own, from its torch; returns the class, as a decorator does.

        @tokenrl.fuse
        @tokenrl.parametrised
        class SoftBand(tokenrl.Gate):
            name = "soft_band"
            width: float = 0.2

            def value(self, s, x, logp, advantages, t):
                return -advantages * self.width * torch.tanh(s / self.width)

    Its pointwise ops are read off a run on a few numbers, its partials are derived by torch's conventions (where an
    infinity is not selected they are 0, not NaN), and both are written as a Triton function and, where there is a C++
    compiler (CXX, or g++), as a functor of the CPU backend; a backend without one says why. Before they are used they
    are held to value and autograd, in fp32 and fp64, by the tolerance rule of tokenrl.parity. Compiling takes seconds,
    once: what is built is kept by its content in TOKENRL_CACHE, or tokenrl in the user's cache.

    Args:
        gate: a class of tokenrl.Gate with a name of its own, whose parameters are numbers with defaults.

    Raises:
        ValueError: what cannot be traced, with its line; a name that another gate has.
        RuntimeError: kernels that are not what the torch value is, with the error; a compiler that fails.
    """
    given = as_gate(gate)
    cls, name = type(given), given.name
    _check_name(cls, name)
    found = traced(given)
    for error in without_advantage(given, tokens()):
        if not error.held:
            accepted = "uses_advantages and vanishes of the class as its value has them"
            raise wrong("gate", f"{name!r}, whose {error.of} is off by {error.error:.1e}", accepted)
    if len(found.parameters) > MAX_PARAMS:
        raise wrong("gate", f"{len(found.parameters)} parameters", f"at most {MAX_PARAMS} in a kernel")
    function = library = None
    if backends.TRITON_REASON is None:
        function = building.triton_function(name, writing.triton_source(found))
        if backends.BACKENDS["triton"].why_not(triton_device()) is None:
            _hold("Triton", triton_values(function), given)
    if (reason := building.why_not_cpp()) is None:
        library = building.library(name, writing.cpp_source(found))
        _hold("C++", library.values, given)
    GATES[name] = cls
    _add(found, function, library, reason)
    return gate


def _check_name(cls: type[Gate], name: str) -> None:
    if not name.isidentifier():
        raise wrong("gate", repr(name), "a name that is an identifier")
    taken = name in backends.BUILT_IN or name in backends.TRITON_GATES or name in backends.CPU_GATES
    if taken or GATES.get(name, cls) is not cls:
        raise wrong("gate", f"{cls.__name__} of the name {name!r}", "a name of its own, of a gate without kernels")


def _hold(of: str, values: Values, gate: Gate) -> None:
    """Raises where value, partials or bounds are not those of the gate's torch."""
    for dtype in (torch.float32, torch.float64):
        for error in (*held_kernel(of, values, gate, tokens(), dtype), *held_at_edges(of, values, gate, dtype)):
            if not error.held:
                found = (
                    f"{error.of} in {str(dtype)[6:]} is off by {error.error:.1e} where {error.allowed:.1e} is allowed"
                )
                raise RuntimeError(f"gate {gate.name!r}: {found}, at {error.at}")


def _add(
    gate: Traced, function: Callable[..., Any] | None, library: building.Library | None, no_cpp: str | None
) -> None:
    """To the tables of the backends, or why not."""
    backends.NOT_FUSED["cuda", gate.gate] = "tokenrl.fuse makes none; Triton runs it on a GPU"
    if function is not None:
        backends.add_triton(gate.gate, function, writing.reads_position(gate))
    if library is None:
        backends.NOT_FUSED["cpu", gate.gate] = str(no_cpp)
    else:
        library.add()
        backends.CPU_GATES[gate.gate] = library.values
