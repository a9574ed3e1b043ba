"""A few cases of each kind of `make fuzz`, and what it does with one that fails."""

import subprocess
import sys

import fuzz
import pytest
from cases import kernel_backends
from hypothesis import strategies as st
from paths import ROOT

BACKEND = kernel_backends()[:1]


@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_few_cases(kind, backend):
    count, case, error = fuzz.one_round(kind, backend, 0, 5)
    assert error is None and count >= 5, (case, error)


@pytest.mark.parametrize("backend", BACKEND)
def test_a_case_that_fails_is_shrunk_and_saved(backend, monkeypatch, tmp_path, capsys):
    def planted(backend, width, rest):
        assert width < 6, "planted"

    monkeypatch.setitem(fuzz.KINDS, "planted", (planted, {"width": st.integers(0, 99), "rest": st.integers(0, 99)}))
    monkeypatch.setattr(fuzz, "KINDS", {"planted": fuzz.KINDS["planted"]})
    assert fuzz.fuzz(0.1, 7, tmp_path, [backend]) >= 1
    text = (tmp_path / f"planted_{backend}_7.py").read_text()
    assert "{'width': 6, 'rest': 0}" in text and text.startswith("# planted") and "round 7" in text
    assert "round 7: planted" in capsys.readouterr().out


@pytest.mark.parametrize("backend", BACKEND)
def test_a_saved_case_runs_alone(backend, tmp_path):
    _, case, _ = fuzz.one_round("logprobs", backend, 0, 2)
    path = fuzz.save(tmp_path, "logprobs", backend, 0, case, AssertionError("none"))
    ran = subprocess.run([sys.executable, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
