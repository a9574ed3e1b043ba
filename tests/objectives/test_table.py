"""The table of objectives as a table: what each row must have, and how a row is changed."""

import pytest

import tokenrl
from tokenrl.objectives.forms.ratios import Gmpo
from tokenrl.objectives.gates import GATES
from tokenrl.objectives.gates.bounded import PpoClip
from tokenrl.objectives.policy import CERTAINTY

ROWS = tokenrl.OBJECTIVES


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_complete(name):
    row = ROWS[name]
    assert row.name == name and GATES[row.gate.name] is type(row.gate)
    assert row.certainty and set(row.certainty) <= set(CERTAINTY)
    assert ("our reading" in row.source) == ("R" in row.certainty)
    parameters = [parameter for part in row.parts.values() for parameter in part.names]
    assert len(parameters) == len(set(parameters))  # one name sets one thing
    assert row.source and all(type(part).__doc__ for part in row.parts.values())


def test_parameters_go_to_the_gate_or_to_the_form():
    row = tokenrl.objective("fipo", eps_low=0.1, half_life=8.0, clamp=5.0)
    assert (row.gate.eps_low, row.form.half_life, row.clamp) == (0.1, 8.0, 5.0)
    assert (ROWS["fipo"].gate.eps_low, ROWS["fipo"].form.half_life) == (0.2, 32.0)
    assert tokenrl.objective("gmpo", form=None).form is None
    with pytest.raises(ValueError, match="^parameter of 'gmpo': got 'eps_hi', accepted: eps_low, .*'eps_high'"):
        tokenrl.objective("gmpo", eps_hi=0.1)
    with pytest.raises(ValueError, match="^form: got a new form and eps_low, accepted: one of the two"):
        tokenrl.objective("gmpo", form=Gmpo(), eps_low=0.1)
    with pytest.raises(ValueError, match="^gate: got a new gate and eps_low, accepted: one of the two"):
        tokenrl.objective("ppo", gate=PpoClip(), eps_low=0.1)


@pytest.mark.parametrize(
    "name,parameters,message",
    [
        ("fipo", {"holes": "fill"}, "holes: got 'fill', accepted: skip, count"),
        ("cppo", {"delta": float("nan")}, "delta: got nan, accepted: a number"),
    ],
)
def test_wrong_parameters_of_forms(name, parameters, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenrl.objective(name, **parameters)


@pytest.mark.parametrize(
    "name,changes,accepted",
    [
        ("cfpo", {"eps": 0.0}, "eps: got 0.0, accepted: a number above 0 or a tensor"),
        ("cfpo", {"eps": -0.2}, "eps: got -0.2, accepted: a number above 0 or a tensor"),
        ("sapo", {"tau_neg": 0}, "tau_neg: got 0, accepted: a number above 0 or a tensor"),
        ("ppo", {"eps_low": -0.2}, "eps_low: got -0.2, accepted: a number, at least 0, or a tensor"),
        ("ctpo", {"eps_dual": -1}, "eps_dual: got -1, accepted: a number, at least 0, or a tensor"),
        ("ppo", {"dual": 1.0}, "dual: got 1.0, accepted: a number above 1 or a tensor"),
        ("hapo", {"dual": 0.9}, "dual: got 0.9, accepted: a number above 1 or a tensor"),
        ("cispo", {"eps_high": -5}, "eps_high: got -5, accepted: a number, at least 0, or a tensor"),
        ("vespo", {"lambda_neg": -1}, "lambda_neg: got -1, accepted: a number, at least 0, or a tensor"),
        ("topr", {"ceiling": 0}, "ceiling: got 0, accepted: a number above 0 or a tensor"),
        ("dppo_tv", {"ceiling": -1}, "ceiling: got -1, accepted: a number above 0 or a tensor"),
        ("dhpo", {"mix": 1.5}, r"mix: got 1.5, accepted: a number in \[0, 1\] or a tensor"),
        ("prime_rl", {"kl_tau": -1}, "kl_tau: got -1, accepted: a number, at least 0, or a tensor"),
        ("dppo_tv", {"eps_high": -0.1}, "eps_high: got -0.1, accepted: a number, at least 0, or a tensor"),
        ("hapo", {"eps_low": float("nan")}, "eps_low: got nan, accepted: a number, at least 0, or a tensor"),
    ],
)
def test_a_bound_of_no_meaning_raises(name, changes, accepted):
    with pytest.raises(ValueError, match=f"^{accepted} with one value per token"):
        tokenrl.objective(name, **changes)
