"""What is released: the source distribution is the repository, a wheel made of it computes what the checkout does, and
the workflow runs what `make` runs, on the Pythons that are supported."""

import fcntl
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version

import pytest
import torch
from paths import ROOT

import tokenrl
from tokenrl import _versions

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_DEVELOPERS = {".ci/run", ".clang-format", ".gitignore", ".pre-commit-config.yaml"}  # and not in a distribution
# What a user's first call gives: run in the wheel, and here.
STEP = """
import json, sys, torch, tokenrl
from tokenrl import cli
batch = tokenrl.parity.random_batch(3, "ctpo", kl_coef=0.1)
logits = batch.tensors["logits"].requires_grad_()
loss, _ = batch.loss(backend="reference")
loss.backward()
found = {"loss": loss.item(), "gradient": logits.grad.tolist()}
"""
OF_WHEEL = """
from importlib.metadata import version
from tokenrl.fusion.building import sources
from tokenrl.ops.backends import NATIVE_REASON
found |= {"at": tokenrl.__file__, "version": version("tokenrl"), "native": NATIVE_REASON, "csrc": sources().is_dir()}
try:
    cli.application()(["objectives", "ctpo"])
except SystemExit as end:
    found["exit"] = end.code
print(json.dumps(found))
"""


def ran(*command, **how) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(the source distribution, a wheel of pure Python made of it), as `make dist` makes them."""
    folder = tmp_path_factory.mktemp("dist")
    env = {**os.environ, "TOKENRL_NATIVE": "0"}
    make = ("setup.py", "-q", "egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder))
    with open(tmp_path_factory.getbasetemp().parent / "release.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # all workers' distributions are put together in one folder of the checkout
        ran(sys.executable, *make, cwd=ROOT, env=env)
    (source,) = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / source.name.removesuffix(".tar.gz")
    ran(sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(folder), cwd=unpacked, env=env)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


def in_repository() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository to compare with")
    listed = ran("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def test_the_source_distribution_is_the_repository(released):
    with tarfile.open(released[0]) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert packed - {"PKG-INFO", "setup.cfg"} == in_repository() - OF_DEVELOPERS


def test_a_wheel_of_pure_python_has_every_module(released):
    with zipfile.ZipFile(released[1]) as archive:
        packed = set(archive.namelist())
    assert released[1].name == f"tokenrl-{version('tokenrl')}-py3-none-any.whl"
    modules = {
        name for name in in_repository() if re.match(r"(tokenrl|bench|csrc|triton_kernels)/.*\.(py|jinja|typed)$", name)
    }
    modules = {re.sub("^(bench|csrc|triton_kernels)/", r"tokenrl/\1/", name) for name in modules}
    extra = {"tokenrl/_build.py", "tokenrl_pytest.py"}
    assert {name for name in packed if name.endswith((".py", ".jinja", ".typed"))} == modules | extra
    assert not [name for name in packed if name.endswith((".so", ".cu", ".pyc"))]


def test_an_installed_wheel_computes_what_the_checkout_does(released, tmp_path):
    pip = [sys._base_executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode:
        pytest.skip(f"{sys._base_executable} has no pip")
    site = tmp_path / "site"
    ran(*pip, "install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(released[1]))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    out = ran(sys.executable, "-c", STEP + OF_WHEEL, cwd=tmp_path, env=env)
    found = json.loads(out.splitlines()[-1])
    here: dict = {}
    exec(STEP, here)
    assert found["at"] == str(site / "tokenrl" / "__init__.py") and found["version"] == version("tokenrl")
    assert found["native"] == "installed with TOKENRL_NATIVE=0" and found["csrc"] and not found.get("exit")
    assert found["loss"] == here["found"]["loss"]
    assert torch.equal(torch.tensor(found["gradient"]), torch.tensor(here["found"]["gradient"]))
    assert torch.tensor(found["gradient"]).any()


def test_the_version_has_one_home():
    (said,) = re.findall(r'^VERSION = "(.+)"', (ROOT / "setup.py").read_text(), re.M)
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert newest == said == version("tokenrl") == tokenrl.__version__
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_citation_says_what_the_schema_demands():
    """Of version 1.2.0: these are required, and no other key is known to it than those listed there."""
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= said.keys() and said["cff-version"] == "1.2.0"
    assert said.keys() <= {"abstract", "authors", "cff-version", "keywords", "license", "message", "title", "type"}
    assert said["type"] == "software" and said["license"] == PROJECT["license"]
    assert all(author.keys() == {"name"} for author in said["authors"]) and len(set(said["keywords"])) > 1


def steps() -> list[dict]:
    return [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_the_workflow_runs_targets_of_make():
    targets = set(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[0].split())
    commands = [step["run"] for step in steps() if "run" in step]
    called = [re.fullmatch(r"make((?: [a-z-]+)+)", command) for command in commands]
    assert all(called), commands
    assert {name for found in called for name in found[1].split()} == {"lint", "test", "docs", "dist", "wheel"}
    assert {name for found in called for name in found[1].split()} <= targets


def test_the_workflow_runs_the_supported_pythons():
    classifiers = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: Python :: 3\.\d+$", c)]
    (_, first), (_, last) = _versions.PYTHON
    assert classifiers == [f"3.{minor}" for minor in range(first, last + 1)]
    assert PROJECT["requires-python"] == f">={classifiers[0]}"
    for job in ("test", "wheels"):
        assert WORKFLOW["jobs"][job]["strategy"]["matrix"]["python"] == classifiers
    used = {step["with"]["python-version"] for step in steps() if "setup-python" in step.get("uses", "")}
    assert used == {"3.11", "${{ matrix.python }}"}


def test_the_workflow_may_read_and_no_more():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 60 for job in WORKFLOW["jobs"].values())
    assert all(re.fullmatch(r"[\w./-]+@v\d+", step["uses"]) for step in steps() if "uses" in step)


def test_security_names_what_there_is():
    text = (ROOT / "SECURITY.md").read_text()
    for name in re.findall(r"`tokenrl\.(\w+)`", text):
        assert hasattr(tokenrl, name), name
    assert "load_batch" in text and "TOKENRL_CACHE" in text
