"""README cannot drift: its table of objectives, its example and its names are checked."""

import importlib.util
import inspect
import operator
import re

import pytest
import torch
from paths import ROOT
from registered import restored

import tokenrl
from tokenrl.instruments.objective_tables import TABLES
from tokenrl.objectives.aggregations import AGGREGATIONS

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_objectives_are_the_tables(name):
    written = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.S)[1]
    assert written == TABLES[name](), "python -m tokenrl.instruments.objective_tables README.md writes it anew"


def test_every_function_of_preference_weights_is_named():
    functions = inspect.getmembers(tokenrl.preference_weights, inspect.isfunction)
    own = [name for name, f in functions if f.__module__ == tokenrl.preference_weights.__name__ and name[0] != "_"]
    assert len(own) == 10 and all(f"`{name}`" in README for name in own), own


@pytest.mark.parametrize("module", ["token_selection", "thoughts", "modes"])
def test_every_function_for_given_texts_is_named(module):
    functions = inspect.getmembers(getattr(tokenrl, module), inspect.isfunction)
    own = [name for name, f in functions if f.__module__.endswith(module) and name[0] != "_"]
    assert own and all(f"`{module}.{name}`" in README for name in own), own


def test_the_examples_run(capsys):
    torch.manual_seed(0)
    names = {}
    with restored():
        for example in re.findall(r"```python\n(.*?)```", README, re.S):
            exec(example, names)
        assert "soft_ctpo" in tokenrl.OBJECTIVES and names["loss"].isfinite()
    assert len(capsys.readouterr().out.split()) == 4 + 3


def test_every_name_in_the_table_of_methods_exists():
    table = re.search(r"<!-- methods -->\n(.*?)\n<!-- /methods -->", README, re.S)[1]
    for line in table.splitlines()[2:]:
        method, objectives, fed = (cell.strip() for cell in line.strip("|").split("|"))
        rows = [name for name in re.findall(r"`(\w+)`", objectives)]
        assert rows or objectives.startswith("any"), method
        for name in rows:
            assert name in tokenrl.OBJECTIVES, (method, name)
        calls = inspect.signature(tokenrl.policy_loss).parameters
        parameters = {name for row in rows for part in tokenrl.OBJECTIVES[row].parts.values() for name in part.names}
        for name in re.findall(r"`([\w.]+)=?(?:[\d.]+)?`", fed):
            found = operator.attrgetter(name)(tokenrl) if "." in name or hasattr(tokenrl, name) else None
            assert callable(found) or name in calls or name in parameters, (method, name)


def test_every_name_that_readme_calls_exists():
    for name in set(re.findall(r"`?tokenrl\.([a-z_]+)\b", README)):
        assert hasattr(tokenrl, name) or importlib.util.find_spec(f"tokenrl.{name}"), name


def test_every_aggregation_and_objective_is_named():
    for name in (
        *AGGREGATIONS,
        *tokenrl.OBJECTIVES,
        *tokenrl.DISTILLATIONS,
        *tokenrl.DIVERGENCES,
        *tokenrl.UNLEARNINGS,
    ):
        assert f"`{name}`" in README, name
