"""Docstrings of public functions: `Args:` says what the signature has, in its order."""

import inspect
import re
import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT / "docs"))
pytest.importorskip("pages", reason="matplotlib is not installed")
from pages import reference

FUNCTIONS = {path: thing for path, thing in reference.public_names().items() if inspect.isfunction(thing)}
WITH_ARGS = {path: thing for path, thing in FUNCTIONS.items() if "\nArgs:\n" in (inspect.getdoc(thing) or "")}


def arguments(docstring: str) -> list[str]:
    section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", docstring, re.S | re.M)[1]
    return re.findall(r"^    (\w+): \S", section, re.M)


@pytest.mark.parametrize("path", WITH_ARGS)
def test_args_are_those_of_the_signature(path):
    assert arguments(inspect.getdoc(WITH_ARGS[path])) == list(inspect.signature(WITH_ARGS[path]).parameters)


def test_every_function_with_arguments_says_them():
    with_arguments = {path for path, thing in FUNCTIONS.items() if inspect.signature(thing).parameters}
    assert len(with_arguments) > 170 and not sorted(with_arguments - WITH_ARGS.keys())
