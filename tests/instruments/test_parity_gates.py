"""`tokenrl parity --gate`: the derivatives of a gate, its declarations, and its Triton function."""

import json
import sys

import pytest
import torch
from cases import gates_under_test
from registered import restored
from typer.testing import CliRunner

import tokenrl
from tokenrl import cli
from tokenrl.instruments.parity.gate_check import as_gate, checked_gate
from tokenrl.objectives.gates import GATES
from tokenrl.objectives.gates.base import straight_through
from tokenrl.ops import backends

REPLACED = {"kl_k1_unbiased", "kl_abs_unbiased", "kl_k3_unbiased"}  # their gradient is another's, on purpose
INTERPRETED = backends.BACKENDS["triton"].why_not(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@tokenrl.parametrised
class Soft(tokenrl.Gate):
    """l = -A width tanh(s / width)"""

    name = "soft_under_test"
    width: float = 0.2

    def value(self, s, x, logp, advantages, t):
        return -advantages * self.width * torch.tanh(s / self.width)


def soft(**changes):
    """A gate of a class of its own, that differs from Soft."""
    return tokenrl.parametrised(type("Changed", (Soft,), changes))()


def failed(report):
    return {error.of for error in report.errors if not error.held}


@pytest.mark.parametrize("name", GATES)
def test_gates_of_the_table(name):
    report = checked_gate(gates_under_test()[name])
    assert failed(report) == ({"derivative by s"} if name in REPLACED else set())
    assert report.no_triton == INTERPRETED


def test_a_right_gate_of_a_user():
    report = checked_gate(as_gate(Soft))
    assert report.held and "it has no kernel of the gate 'soft_under_test'" in (report.no_triton or INTERPRETED)


def wrong_gradient(self, s, x, logp, advantages, t):
    return straight_through(Soft.value(self, s, x, logp, advantages, t), -advantages * s)


def kinked(self, s, x, logp, advantages, t):
    return -advantages * (s - (s * 3e5).round() / 3e5).abs()  # kinks everywhere


WRONG = {
    "a gradient of another": ({"value": wrong_gradient}, {"derivative by s"}),
    "a stopped gradient": (
        {"value": lambda self, s, x, logp, advantages, t: -advantages * s.detach() * s},
        {"derivative by s"},
    ),
    "a slope that is not declared": (
        {"value": lambda self, s, x, logp, advantages, t: -advantages * s * logp},
        {"derivative by logp, which slopes does not name"},
    ),
    "a slope that is missing": ({"slopes": ("logp",)}, {
        "derivative by s, which slopes does not name",
    }),
    "a part without advantage": (
        {"value": lambda self, s, x, logp, advantages, t: s * s - advantages * s},
        {"value where A is 0"},
    ),
    "advantages that are not declared": ({"uses_advantages": False}, {"value with other advantages"}),
    "the mean over tokens": (
        {"value": lambda self, s, x, logp, advantages, t: -advantages * (s - s.mean().detach())},
        {"value without the other tokens", "derivative by s"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    changes, expected = WRONG[case]
    report = checked_gate(soft(**changes))
    assert failed(report) == expected
    for error in report.errors:
        assert error.held or set(error.at) == {"s", "x", "logp", "advantages", "t"}


def test_kinks_are_left_out():
    clip = checked_gate(soft(value=lambda self, s, x, logp, advantages, t: -advantages * s.clamp(-1e-5, 1e-5)))
    assert clip.held and clip.at_kinks > 0
    assert checked_gate(soft(value=kinked)).at_kinks > 1000


ERRORS = {
    "no gate": (3, "gate: got 3, a int, accepted: a subclass of tokenrl.Gate"),
    "a class that is none": (dict, "gate: got a type, accepted: a subclass of tokenrl.Gate"),
    "no name": (type("Nameless", (tokenrl.Gate,), {}), "gate: got Nameless without a name"),
    "no defaults": (
        tokenrl.parametrised(type("Bare", (tokenrl.Gate,), {"__annotations__": {"width": float}, "name": "bare"})),
        r"gate: got Bare\(\): .*width.*, accepted: a class with defaults, or one of its gates",
    ),
    "a tensor": (Soft(width=torch.ones(3)), "gate: got 'soft_under_test' with a tensor for a parameter"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_no_gate_is_named(case):
    given, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        as_gate(given)


FORMS = {
    "value": ({"value": lambda self, s, **more: s.sum()}, r"value of .*: got a torch.Tensor of torch.float32 \[\]"),
    "precision": ({"value": lambda self, s, **more: s.double()}, "value of .*: got a torch.Tensor of torch.float64"),
    "two bounds": ({"clipped": lambda self, s, **more: (s > 0, s < 0)}, "clipped of .*: got a tuple, accepted: three"),
    "bounds of numbers": (
        {"clipped": lambda self, s, **more: (s, s, s)},
        "clipped of .*: got a torch.Tensor of torch.f",
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_a_wrong_result_is_named(case):
    changes, message = FORMS[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        checked_gate(soft(**changes))


@pytest.fixture
def tables():
    with restored():
        yield


@pytest.mark.skipif(INTERPRETED is not None, reason=str(INTERPRETED))
@pytest.mark.parametrize("function", ["soft", "soft_without_chain_rule"])
def test_its_triton_function_is_held_to_its_torch(function, tables):
    import own_gates

    tokenrl.register(tokenrl.Objective("under test", "token", Soft(), "token-mean", "a test"))
    tokenrl.register_triton(Soft, getattr(own_gates, function))
    report = checked_gate(Soft(width=0.3))
    assert report.no_triton is None
    wrong = {name.split(",")[0] for name in failed(report)}
    assert wrong == (set() if function == "soft" else {"Triton's d_s", "Triton's low"})


def test_the_command(tmp_path, monkeypatch):
    (tmp_path / "users_gates.py").write_text(
        "import torch\nimport tokenrl\n\n\n@tokenrl.parametrised\nclass Slope(tokenrl.Gate):\n    name = 'slope'\n\n"
        "    def value(self, s, x, logp, advantages, t):\n        return -advantages * s * logp\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def called(*options):
        return CliRunner().invoke(cli.application(), ["parity", *options], env={"COLUMNS": "80"})

    done = called("--gate", "users_gates:Slope")
    assert done.exit_code == 1 and "which slopes does not name" in done.output and "most at" in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    found = json.loads(called("--gate", "users_gates:Slope", "--json").output)
    assert not found["held"] and found["gate"] == "slope"
    assert [error["of"] for error in found["errors"] if not error["held"]] == [
        "derivative by logp, which slopes does not name"
    ]
    assert called("--gate", "tokenrl.objectives.gates.bounded:LogBand").exit_code == 0
    for options, message in {
        ("--gate", "users_gates:Slop"): "Did you mean 'Slope'",
        ("--gate", "user_gates:Slope"): "Did you mean 'users_gates'",
        ("--gate", "users_gates:Slope", "--objective", "ctpo"): "objective: got ctpo, accepted: nothing beside --gate",
    }.items():
        done = called(*options)
        assert done.exit_code == 1 and message in done.output.replace("\n", " "), (options, done.output)
