"""The kernels that are written of a gate's torch, token by token: built-in formulas retyped, and every op."""

import host_build
import pytest
import torch
from fused_gates import FUNCTIONS, PLAIN, cpp_values, every_gate

from tokenrl.fusion import building
from tokenrl.fusion.expressions import OPS, in_order
from tokenrl.fusion.trace import traced
from tokenrl.fusion.writing import triton_source
from tokenrl.instruments.parity.gate_kernels import held_at_edges, held_kernel, triton_device, triton_values
from tokenrl.instruments.parity.gate_tokens import tokens
from tokenrl.ops import backends

NO_TRITON = backends.BACKENDS["triton"].why_not(triton_device())
SINGLE, DOUBLE = torch.float32, torch.float64


@pytest.fixture(params=["C++", "Triton"])
def language(request):
    if reason := host_build.why_not() if request.param == "C++" else NO_TRITON:
        pytest.skip(reason)
    return request.param


def values_of(language, name):
    if language == "C++":
        return cpp_values(name)
    return triton_values(building.triton_function(name, triton_source(traced(every_gate()[name]))))


def precisions(language, interpreted):
    """The interpreter is slow and takes one of them."""
    return (SINGLE, DOUBLE) if language == "C++" else (interpreted,)


@pytest.mark.parametrize("name", PLAIN)
def test_a_formula_retyped_has_the_numbers_of_the_built_in_gate(name, language):
    _, built_in = PLAIN[name]
    for dtype in precisions(language, SINGLE):
        errors = list(held_kernel(name, values_of(language, name), built_in, tokens(), dtype))
        assert len(errors) == 6 and all(error.held for error in errors), errors


@pytest.mark.parametrize("name", every_gate())
def test_at_its_edges_it_has_the_conventions_of_torch(name, language):
    for dtype in precisions(language, DOUBLE):
        errors = list(held_at_edges(name, values_of(language, name), every_gate()[name], dtype))
        assert len(errors) == 12 and all(error.held for error in errors), [e for e in errors if not e.held]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, language):
    for dtype in precisions(language, SINGLE):
        errors = list(held_kernel(name, values_of(language, name), every_gate()[name], tokens(), dtype))
        assert all(error.held for error in errors), [error for error in errors if not error.held]


def test_every_op_is_in_one_of_these():
    used = {x.op.name for gate in every_gate().values() for x in in_order(traced(gate).results.values()) if x.op}
    assert used == {*OPS} - {"detach"}
