"""The command line: doctor, unknown commands, missing packages."""

import importlib.util
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tokenrl import backends, cli


def called(*arguments: str):
    return CliRunner().invoke(cli.application(), list(arguments), env={"COLUMNS": "200"})


def test_doctor_names_every_backend_with_can_run_or_its_reason():
    outcome = called("doctor")
    assert outcome.exit_code == 0
    seen = " ".join(outcome.output.split())
    for package in ("Python", "torch", "triton", "numpy", "tokenrl"):
        assert package in seen
    for name, backend in backends.BACKENDS.items():
        reason = backend.why_not(backends.torch.device("cpu")) or "can run"
        assert f"{name} {' '.join(reason.split())}" in seen


def test_doctor_prints_reasons_as_they_are(monkeypatch):
    never = backends.Backend("cpu", "tokenrl", lambda device: "no compiler [c++] was found")
    monkeypatch.setattr(cli, "BACKENDS", {"cpu": never})
    assert "no compiler [c++] was found" in called("doctor").output


def test_an_unknown_command_is_an_error():
    outcome = called("dmeo")
    assert outcome.exit_code == 2 and "dmeo" in outcome.output


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_package_names_the_extra(monkeypatch, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert missing in str(stop.value) and "tokenrl[demo]" in str(stop.value)


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "tokenrl.cli", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "doctor" in done.stdout and "demo" in done.stdout
