"""README cannot drift: its size, its numbers, its links, its pictures; and what the pages say of methods and names."""

import inspect
import json
import operator
import re
import sys

import pytest
from paths import ROOT

import tokenrl
from tokenrl.instruments.catalogue import FAMILIES, entries

sys.path.insert(0, str(ROOT / "docs"))
pages = pytest.importorskip("pages", reason="matplotlib is not installed")
from pages import drawn, papers  # noqa: E402

README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_readme_names_the_architectures_of_the_build():
    built = re.search(r'^ARCHITECTURES = "(.+)"', (ROOT / "setup.py").read_text(), re.M)[1]
    names = [f"sm_{one.removesuffix('+PTX').replace('.', '')}" for one in built.split(";")]
    assert f"{', '.join(names[:-1])} and {names[-1]}" in " ".join(README.split())


def test_the_numbers_of_readme_are_those_of_the_results():
    """Each is followed by a link to where it stands."""
    results = {name: json.loads((ROOT / f"bench/results/{name}.json").read_text()) for name in ("cpu", "trl")}
    versus = next(line["versus"] for line in results["cpu"]["lines"] if line["op"] == "token_logprobs")
    steps = {row["what"]: row for row in results["trl"]["trl"]}
    theirs, ours = (steps[f"{way}, 50% of 8 x 128 tokens"] for way in ("TRL", "tokenrl, one-pass"))
    golden = [entry["cases"] for entry in json.loads((ROOT / "tests/golden/index.json").read_text()).values()]
    said = (
        f"**{versus['TRL'][1]:.1f}x** as fast as TRL, {versus['compile'][1]:.1f}x as torch.compile",
        f"**{theirs['seconds'] / ours['seconds']:.1f}x** as fast and {theirs['bytes'] / ours['bytes']:.1f}x smaller",
        f"**{sum(map(len, golden))}** recorded outputs",
        f"in {len(golden)} families",
        f"{len(tokenrl.OBJECTIVES)} policy objectives",
    )
    text = " ".join(README.split())
    assert not [number for number in said if number not in text]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_page_links_to_exists(path):
    text = path.read_text()
    links = [found[1] or found[2] for found in re.finditer(r'\]\(([^)#:\s]+)(?:#[^)]*)?\)|src(?:set)?="([^"]+)"', text)]
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", drawn.all_pictures(), ids=lambda path: path.stem)
def test_the_pictures_are_those_of_the_results(path):
    assert path.read_text() == drawn.all_pictures()[path], "PYTHONPATH=.:docs python -m pages.drawn writes them"


@pytest.mark.parametrize("method", papers.METHODS, ids=lambda method: method["name"])
def test_every_name_of_a_method_exists(method):
    rows = {entry.name for entry in entries()}
    assert set(method["rows"]) <= rows
    assert all(callable(operator.attrgetter(name)(tokenrl)) for name in method.get("fed", ()))
    assert method["rows"] or method["example"]


def test_every_family_has_its_page_and_every_row_its_section():
    for family in FAMILIES:
        page = pages.rows.page(family)
        text = pages.written((DOCS / "objectives" / f"{page}.md").read_text())
        for entry in entries():
            if entry.family == family:
                assert f"\n## {entry.name}\n" in text and entry.example in text
    assert all(f"(docs/objectives/{pages.rows.page(family)}.md)" in README for family in FAMILIES)


def test_every_function_of_preference_weights_is_named():
    functions = inspect.getmembers(tokenrl.preference_weights, inspect.isfunction)
    own = [name for name, f in functions if f.__module__ == tokenrl.preference_weights.__name__ and name[0] != "_"]
    page = (DOCS / "objectives" / "preference.md").read_text()
    assert len(own) == 10 and all(f"`{name}`" in page for name in own), own


@pytest.mark.parametrize("module", ["token_selection", "thoughts", "modes"])
def test_every_function_for_given_texts_is_named(module):
    functions = inspect.getmembers(getattr(tokenrl, module), inspect.isfunction)
    own = [name for name, f in functions if f.__module__.endswith(module) and name[0] != "_"]
    page = (DOCS / "objectives" / "given_texts.md").read_text() + (DOCS / "papers.toml").read_text()
    assert own and all(f"{module}.{name}" in page for name in own), own


def test_every_name_that_a_page_calls_exists():
    for path in PAGES:
        for name in set(re.findall(r"`tokenrl\.([a-z_]+)\b", path.read_text())):
            assert hasattr(tokenrl, name) or (ROOT / "tokenrl" / name).exists(), (path, name)
