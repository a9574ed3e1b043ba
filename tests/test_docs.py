"""README cannot drift: its table of objectives, its example and its names are checked."""

import re
from pathlib import Path

import torch

import tokenrl
from tokenrl.describe import objectives_table

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_table_of_objectives_is_the_table():
    written = re.search(r"<!-- objectives -->\n(.*?)\n<!-- /objectives -->", README, re.S)[1]
    assert written == objectives_table(), "python -m tokenrl.docs README.md writes it anew"


def test_the_examples_run(capsys):
    torch.manual_seed(0)
    names = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(example, names)
    assert len(capsys.readouterr().out.split()) == 4 + 3


def test_every_name_that_readme_calls_exists():
    for name in set(re.findall(r"`?tokenrl\.([a-z_]+)\b", README)):
        assert hasattr(tokenrl, name), name


def test_every_aggregation_and_objective_is_named():
    for name in (*tokenrl.aggregate.AGGREGATIONS, *tokenrl.OBJECTIVES):
        assert f"`{name}`" in README, name
