"""Divergences have the same names, in the same order, with the same parameters, in Python, in C++ and in Triton."""

import importlib
import inspect

import pytest

from tokenrl.objectives.divergences import DIVERGENCES
from tokenrl.ops import backends

KINDS = [(name, list(kind.names)) for name, kind in DIVERGENCES.items()]


def test_every_parameter_is_a_number():
    assert all(len(names) == len(DIVERGENCES[kind]().params()) for kind, names in KINDS)


def test_in_cpp():
    bindings = pytest.importorskip("tokenrl._bindings")
    assert bindings.divergences() == KINDS


@pytest.mark.skipif(backends.TRITON_REASON is not None, reason=str(backends.TRITON_REASON))
def test_in_triton():
    functions = importlib.import_module("tokenrl.triton_kernels.divergences").DIVERGENCES
    most = importlib.import_module("tokenrl.triton_kernels.pair_row").MOST_PARAMS
    found = [(name, list(inspect.signature(function.fn).parameters)) for name, function in functions.items()]
    assert found == [(name, ["log_p", "log_r", "p", "r", *names]) for name, names in KINDS]
    assert max(len(names) for _, names in KINDS) == most
