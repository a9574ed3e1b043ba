"""The command line: doctor, objectives, unknown commands, missing packages."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from typer.testing import CliRunner

import tokenrl
from tokenrl import cli
from tokenrl.instruments import doctor
from tokenrl.integrations import hosts
from tokenrl.ops import backends


def called(*arguments: str, width: int = 200):
    return CliRunner().invoke(cli.application(), list(arguments), env={"COLUMNS": str(width)})


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
    monkeypatch.setattr(doctor, "BACKENDS", {"cpu": never})
    assert "no compiler [c++] was found" in called("doctor").output


def test_doctor_names_the_trainers_that_are_installed(monkeypatch):
    found = {"trl": "1.16.0", "verl": "0.5.0", "openrlhf": "0.12.0"}
    monkeypatch.setattr(hosts, "version_of", found.get)
    seen = " ".join(called("doctor").output.split())
    assert "trl 1.16.0 1.10.0 to 1.16.0 the loss works" in seen
    assert "verl 0.5.0 0.6.1 to 0.9.1 the losses and the head verl: got 0.5.0, accepted: verl 0.6.1 to 0.9.1" in seen
    assert "openrlhf 0.12.0 0.11.2 to 0.11.2 the loss openrlhf: got 0.12.0, held to" in seen and "skyrl" not in seen
    monkeypatch.setattr(hosts, "version_of", lambda name: None)
    assert "trainer" not in called("doctor").output


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


def test_bench_is_the_module_at_the_top():
    outcome = called("bench", "--device", "cpu", "--check-only", "--op", "policy_loss")
    assert outcome.exit_code == 0 and "1 checks: every value and gradient is within" in outcome.output
    assert Path(sys.modules["tokenrl.bench"].__file__).parent == ROOT / "bench"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_an_example(name):
    outcome = called(name, "--help")
    assert outcome.exit_code == 0 and f"Example: tokenrl {name}" in outcome.output


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "tokenrl.cli", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "doctor" in done.stdout and "demo" in done.stdout


def test_objectives_lists_the_table():
    outcome = called("objectives", width=80)
    assert outcome.exit_code == 0
    for name, row in tokenrl.OBJECTIVES.items():
        line = next(line for line in outcome.output.splitlines() if line.split()[:1] == [name])
        assert row.statistic in line and row.gate.name in line and row.flow in line
    assert max(map(len, outcome.output.splitlines())) <= 80 and "…" not in outcome.output
    rows = json.loads(called("objectives", "--json").output)
    assert sorted(row["name"] for row in rows if row["table"] == "policy") == sorted(tokenrl.OBJECTIVES)
    for table in (tokenrl.PREFERENCES, tokenrl.DISTILLATIONS, tokenrl.DIVERGENCES, tokenrl.UNLEARNINGS):
        assert set(table) <= {row["name"] for row in rows}
    assert rows[0] == json.loads(called("objectives", rows[0]["name"], "--json").output)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--family", "prefix"), {"ctpo", "ctpo_geomean", "ctpo_fixed", "ctpo_geomean_fixed", "minpro", "minpro_capped",
                                  "minpro_clip"}),
        (("--paper", "2605.07331"), {"ctpo", "ctpo_geomean", "ctpo_fixed", "ctpo_geomean_fixed"}),
        (("--paper", "2605.07331", "--search", "prefix_mean"), {"ctpo_geomean", "ctpo_geomean_fixed"}),
        (("--search", "DeepSeek or none"), None),
        (("--family", "prefixes"), None),
    ],
)  # fmt: skip
def test_objectives_are_found_by_family_paper_and_text(options, expected):
    outcome = called("objectives", *options, "--json")
    if expected is None:
        assert outcome.exit_code == 1 and "accepted: " in outcome.output
    else:
        assert {row["name"] for row in json.loads(outcome.output)} == expected


@pytest.mark.parametrize("name", tokenrl.OBJECTIVES)
def test_an_objective_in_full(name):
    outcome, row = called("objectives", name), tokenrl.OBJECTIVES[name]
    assert outcome.exit_code == 0
    seen = outcome.output
    assert row.source in seen and f"flow {row.flow!r}" in seen and f"w of {row.aggregation!r}" in seen
    for part in row.parts.values():
        assert type(part).__doc__.split("\n")[0] in seen
        for parameter in part.names:
            assert f"{parameter} = " in seen
    assert all(f"[{letter}] " in seen for letter in row.certainty)
    assert "runs on\n  cuda, cpu, triton, reference" in seen


def test_a_mistyped_objective_names_the_nearest():
    outcome = called("objectives", "cptp")
    assert outcome.exit_code == 1 and "Did you mean 'ctpo'?" in outcome.output
