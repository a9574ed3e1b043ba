"""Links and scores have the same names, in the same order, with the same parameters, in Python, C++ and Triton."""

import importlib
import inspect

import pytest

from tokenrl.objectives.links import LINKS, OfLabels
from tokenrl.objectives.scores import SCORES
from tokenrl.ops import backends

OF_LINKS = [(name, list(link.names)) for name, link in LINKS.items()]
OF_SCORES = [(name, list(score.names)) for name, score in SCORES.items()]


def test_in_cpp():
    bindings = pytest.importorskip("tokenrl._bindings")
    assert bindings.links() == OF_LINKS and bindings.scores() == OF_SCORES


@pytest.mark.skipif(backends.TRITON_REASON is not None, reason=str(backends.TRITON_REASON))
def test_in_triton():
    functions = importlib.import_module("tokenrl.triton_kernels.links")
    most = importlib.import_module("tokenrl.triton_kernels.preference").MAX_PARAMS
    found = [(name, list(inspect.signature(function.fn).parameters)) for name, function in functions.LINKS.items()]
    scores = ["chosen", "rejected", "desirable"]
    assert found == [(name, [*scores, *names]) for name, names in OF_LINKS]
    assert max(len(names) for _, names in OF_LINKS) == most
    assert list(functions.SCORES) == list(SCORES) and all(len(names) <= 1 for _, names in OF_SCORES)


def test_labels_come_with_what_they_are_compared_with():
    assert {name for name, link in LINKS.items() if issubclass(link, OfLabels)} == {
        "kto", "apo_zero_unpaired", "bco_unpaired",
    }  # fmt: skip
