"""Every block of Python of README and of docs/ runs."""

import ast
import re
import shlex
import sys

import pytest
import torch
import typer
from paths import ROOT
from registered import restored

from tokenrl import cli

sys.path.insert(0, str(ROOT / "docs"))
pages = pytest.importorskip("pages", reason="matplotlib is not installed")

BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
DOCS = ROOT / "docs"
TRAINERS = DOCS / "guides" / "trainers"
PAGES = [ROOT / "README.md", *(path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts)]


def blocks(path) -> list[str]:
    return BLOCK.findall(pages.written(path.read_text()))


def before(path) -> list[str]:
    """What a page says that its examples start from: the batch of the objectives, or the quickstart's first block."""
    if path.name in ("README.md", "quickstart.md"):
        return []
    batch, first = blocks(DOCS / "objectives" / "index.md"), blocks(DOCS / "quickstart.md")[:1]
    if path == DOCS / "objectives" / "index.md":
        return []
    return batch if path.parent.name == "objectives" or path.name == "papers.md" else first


@pytest.fixture
def tables():
    """What the examples register is taken out again."""
    with restored():
        yield


RUN = [path for path in PAGES if BLOCK.search(path.read_text()) or "<!-- " in path.read_text()]
RUN = [path for path in RUN if path.parent != TRAINERS and blocks(path)]


@pytest.mark.parametrize("path", RUN, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_run(path, tables, known_limits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {"__name__": "example"}
    for block in (*before(path), *blocks(path)):
        exec(compile(block, str(path), "exec"), names)


@pytest.mark.parametrize("path", sorted(TRAINERS.glob("*.md")), ids=lambda path: path.stem)
def test_what_an_example_in_a_trainer_imports_is_there(path):
    """These need their hosts to run; what they take of tokenrl is looked up in its source, without them."""
    for block in blocks(path):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("tokenrl"):
                assert not {name.name for name in node.names} - defined(node.module), (path.name, node.module)


def defined(module: str) -> set[str]:
    """What a module names at its top, and the modules in it."""
    source = ROOT.joinpath(*module.split("."))
    inside = {path.stem for path in source.glob("*.py")} | {path.name for path in source.glob("*/")}
    text = (source / "__init__.py" if source.is_dir() else source.with_suffix(".py")).read_text()
    return inside | set(re.findall(r"\w+", text))


def commands(path) -> list[list[str]]:
    """The lines of a page that call the command line, as arguments."""
    lines = re.findall(r"^(?:    )?tokenrl ([a-z][^`\n]*?)(?:  .*)?$", path.read_text(), re.M)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("path", [path for path in PAGES if commands(path)], ids=lambda path: path.stem)
def test_every_option_that_a_page_names_exists(path):
    group = typer.main.get_command(cli.application())
    for name, *arguments in commands(path):
        context = group.commands[name].make_context(name, arguments, resilient_parsing=True)
        group.commands[name].make_parser(context).parse_args(list(arguments))  # raises for one that does not
