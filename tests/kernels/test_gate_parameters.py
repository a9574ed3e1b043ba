"""A gate's parameters have the same names in the same order in Python, in C++ and in Triton."""

import importlib
import inspect

import pytest

import tokenrl
from tokenrl.objectives import gates
from tokenrl.objectives.gates.weighted import Cispo, Rec
from tokenrl.ops import backends

BOUNDS = {
    Cispo: ["low", "high"], Rec: ["weight_low", "weight_high", "low", "high", "ring_low", "ring_high"],
}  # fmt: skip


def names_of(gate: type[tokenrl.Gate]) -> list[str]:
    """As its kernels take them, which is numbers: params() of BOUNDS are those, however their fields spell them."""
    return BOUNDS[gate] if gate in BOUNDS else [name for name in gate.names if name not in gate.words]


GATES = [(name, names_of(gate)) for name, gate in gates.GATES.items()]


def test_every_parameter_is_named():
    assert all(len(names) == len(gates.GATES[gate]().params()) for gate, names in GATES)


def test_in_cpp():
    bindings = pytest.importorskip("tokenrl._bindings")
    assert bindings.gates() == GATES


@pytest.mark.skipif(backends.TRITON_REASON is not None, reason=str(backends.TRITON_REASON))
def test_in_triton():
    functions = importlib.import_module("tokenrl.triton_kernels.gates").GATES
    found = {name: list(inspect.signature(function.fn).parameters) for name, function in functions.items()}
    assert found == {name: ["s", "x", "logp", "advantage", "t", *names] for name, names in GATES}
