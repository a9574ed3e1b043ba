"""README's table of preference objectives is that of the code; run as a program, this file writes it there."""

import inspect
import re

from paths import ROOT

import tokenrl
from tokenrl.objectives.links import Score

README = ROOT / "README.md"
BETWEEN = r"<!-- preferences -->\n(.*?)\n<!-- /preferences -->"


def formula(part):
    """The docstring of a link or score, for a cell."""
    text = " ".join(inspect.cleandoc(type(part).__doc__).rstrip(".").split())
    return text.replace("|", r"\|")


def cells(row):
    parameters = {name: getattr(part, name) for part in row.parts.values() for name in part.names}
    parameters |= {name: getattr(row, name) for name in ("divergence", "nll") if getattr(row, name)}
    link = formula(row.link)
    if type(row.score) is not Score:
        link = f"{link}, of scores {formula(row.score)}"
    if row.coupling not in ("pairs", "labels"):
        link = f"{link}, {row.coupling}"
    if row.divergence_flow != "both":
        link = f"{link}, divergence of the {row.divergence_flow} alone"
    given = ", ".join(f"{name}={value}" for name, value in parameters.items())
    return f"`{row.name}`", link, row.statistic, row.reference, given, row.source, f"[{row.certainty}]"


def table():
    """Markdown, one line per row of PREFERENCES."""
    columns = ("name", "link", "statistic", "reference", "parameters", "source", "certainty")
    lines = [columns, ("---",) * len(columns), *map(cells, tokenrl.PREFERENCES.values())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_the_table_of_preference_objectives_is_the_table():
    written = re.search(BETWEEN, README.read_text(), re.S)[1]
    assert written == table(), "PYTHONPATH=tests/support python tests/docs/test_preference_table.py writes it anew"


def test_every_function_of_preference_weights_is_named():
    functions = inspect.getmembers(tokenrl.preference_weights, inspect.isfunction)
    own = [name for name, f in functions if f.__module__ == tokenrl.preference_weights.__name__ and name[0] != "_"]
    assert len(own) == 8 and all(f"`{name}`" in README.read_text() for name in own), own


if __name__ == "__main__":
    between = f"<!-- preferences -->\n{table()}\n<!-- /preferences -->"
    README.write_text(re.sub(BETWEEN, lambda _: between, README.read_text(), flags=re.S))
