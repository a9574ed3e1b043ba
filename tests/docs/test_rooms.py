"""The rooms: what imports what, the import paths that stay, and the paths that comments name."""

import ast
import importlib
import itertools
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import tokenrl

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
LINT = "import sys; from importlinter import cli; sys.exit(cli.lint_imports(sys.argv[1], no_cache=True))"
ALIASES = (
    "rewards", "corrections", "bounds", "selection", "conflicts", "divergence_weights", "hidden_reward", "parity",
)  # fmt: skip


def linted(folder: Path, added: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """import-linter on a copy of the package as it is installed, lines added at the end of some of its files."""
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    for source, target in (
        ("tokenrl", "tokenrl"), ("triton_kernels", "tokenrl/triton_kernels"), ("bench", "tokenrl/bench"),
    ):  # fmt: skip
        shutil.copytree(ROOT / source, folder / target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name, line in added.items():
        path = folder / "tokenrl" / name
        path.write_text(f"{path.read_text() if path.exists() else ''}\n{line}\n")
    command = [sys.executable, "-c", LINT, str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_room_imports_only_rooms_below_it(tmp_path):
    done = linted(tmp_path, {})
    assert done.returncode == 0 and "1 kept, 0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "line", "named"),
    [
        ("methods/gtpo.py", "from ..losses import policy", "tokenrl.methods is not allowed to import tokenrl.losses"),
        ("advantages/rewards.py", "from ..losses import policy", "tokenrl.advantages is not allowed to import"),
        ("triton_kernels/gates.py", "from ..logprobs import from_logits", "tokenrl.triton_kernels is not allowed"),
        ("batch/spans.py", "def late():\n    from .. import policy_loss", "tokenrl.batch is not allowed to import"),
        ("utils.py", "", "utils"),
    ],
)
def test_a_wrong_import_is_noticed(tmp_path, name, line, named):
    done = linted(tmp_path, {name: line})
    assert done.returncode == 1 and named in done.stdout, done.stdout + done.stderr


def public(module) -> list[str]:
    return getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]


@pytest.mark.parametrize("name", ["", "advantages", "compat", *ALIASES])
def test_every_spelling_of_an_import(name):
    module = importlib.import_module(f"tokenrl.{name}".rstrip("."))
    found = {}
    exec(f"import {module_name(name)}", found)
    if name:
        exec(f"from tokenrl import {name}", found)
        assert found[name] is module is getattr(tokenrl, name)
    for public_name in public(module):
        exec(f"from {module_name(name)} import {public_name}", found)
        assert found[public_name] is getattr(module, public_name)


def module_name(name: str) -> str:
    return f"tokenrl.{name}" if name else "tokenrl"


def remarks(path: Path) -> str:
    """The comments and docstrings of a source, all of a page."""
    text = path.read_text()
    if path.suffix == ".md":
        return text
    if path.suffix != ".py":
        return "\n".join(re.findall(r"//.*", text))
    with tokenize.open(path) as file:
        found = [token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.COMMENT]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found += [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return "\n".join(found)


ROOMS = ("tokenrl", "triton_kernels", "csrc", "tests", "bench", "examples")
SOURCES = [
    path for room in ROOMS for kind in ("py", "h", "cpp", "cu", "cuh") for path in (ROOT / room).rglob(f"*.{kind}")
]
PATHS = rf"(?<![\w./-])(?:{'|'.join(ROOMS)}|docs)/[\w./*{{}},-]*[\w*}}/]"
FILES = r"(?<![\w./*-])[\w-]+\.(?:py|h|cuh|cu|cpp|sh)\b"
FOREIGN = {"malloc.h"}  # named in comments, and not ours


def unbraced(path: str) -> list[str]:
    """a/{b,c}.h -> a/b.h, a/c.h."""
    parts = [part.strip("{}").split(",") for part in re.split(r"(\{.*?\})", path)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def missing(text: str) -> set[str]:
    """The paths (globs too) and file names in a text that do not exist here."""
    names = {path.name for path in (*SOURCES, *ROOT.glob("*.*"), *(ROOT / "bench").glob("*.sh"))} | FOREIGN
    paths = {path for found in re.findall(PATHS, text) for path in unbraced(found)}
    return {path for path in paths if not any(ROOT.glob(path))} | {*re.findall(FILES, text)} - names


WRITTEN = [  # but for those of trainers, whose metrics' names look like paths
    str(path.relative_to(ROOT))
    for path in (ROOT / "docs").rglob("*.md")
    if not {"_build", "trainers"} & set(path.parts)
]


@pytest.mark.parametrize("room", [*ROOMS, "README.md", "CONTRIBUTING.md", *WRITTEN])
def test_every_path_that_a_comment_names_exists(room):
    sources = [path for path in SOURCES if path.is_relative_to(ROOT / room)] or [ROOT / room]
    found = {str(path.relative_to(ROOT)): missing(remarks(path)) for path in sources}
    assert not {name: paths for name, paths in found.items() if paths}


def test_a_path_that_does_not_exist_is_noticed():
    text = "See tokenrl/nowhere.py, csrc/{kernels,nothing}.h, tests/*.rs (nobody.cuh); tokenrl/ops/*.py and README.md."
    assert missing(text) == {"tokenrl/nowhere.py", "csrc/nothing.h", "tests/*.rs", "nobody.cuh"}
