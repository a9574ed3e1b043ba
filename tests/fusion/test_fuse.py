"""tokenrl.fuse: a fused gate in every loss, what it refuses, what it keeps, and that it holds kernels to the torch."""

import subprocess
from dataclasses import replace

import pytest
import torch
from cases import batch, device_of, run
from fused_gates import PlainBand, PlainCispo, cpp_values, refused
from registered import TABLES, restored

import tokenrl
from tokenrl.fusion import building, expressions
from tokenrl.instruments.parity import close
from tokenrl.objectives.gates import GATES
from tokenrl.objectives.gates.base import straight_through
from tokenrl.objectives.metrics import RAW
from tokenrl.ops import backends

NO_CPP = building.why_not_cpp()
FUSED = {"cpu": NO_CPP, "triton": backends.BACKENDS["triton"].why_not(device_of("triton"))}


@pytest.fixture(autouse=True)
def tables():
    with restored():
        yield


@pytest.fixture(scope="module")
def fused_band():
    """What tokenrl.fuse(PlainBand) put into each table."""
    with restored():
        assert tokenrl.fuse(PlainBand) is PlainBand
        yield [{key: value for key, value in table.items() if "plain_band" in key} for table in TABLES]


@pytest.fixture
def without_cpp(monkeypatch):
    monkeypatch.setattr(building, "why_not_cpp", lambda: "no C++ compiler: install g++ or set CXX")


@pytest.fixture
def band(fused_band):
    """CTPO, its gate retyped and fused."""
    for table, entries in zip(TABLES, fused_band, strict=True):
        table.update(entries)
    built_in = tokenrl.objective("ctpo", eps_low=0.1, eps_high=0.15, eps_dual=0.3)
    gate = PlainBand(0.1, 0.15, eps_dual=0.3)
    return tokenrl.register(replace(built_in, name="plain_ctpo", gate=gate)), built_in


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_has_the_numbers_of_the_built_in_objective(band, backend, dtype):
    if FUSED[backend]:
        pytest.skip(FUSED[backend])
    row, built_in = band
    case = batch(5, rows=8)
    width = torch.linspace(0.05, 0.2, case["mask"].numel(), dtype=torch.float64).reshape(case["mask"].shape)
    for parameters in ({}, {"eps_low": width}):
        given = [tokenrl.objective(of, **parameters) for of in (row, built_in, built_in)]
        places = (backend, "reference", "reference")
        found = [run(*one) for one in zip(given, [case] * 3, places, (dtype, torch.float64, dtype), strict=True)]
        for name, kernel, truth, base in zip(("loss", "gradient"), *(one[:2] for one in found), strict=True):
            close(kernel, truth, base, name)
        kernel, truth, _ = (dict(zip(RAW, metrics.tolist(), strict=True)) for *_, metrics in found)
        assert all(kernel[name] == truth[name] for name in RAW if name.startswith("clip"))
        assert min(truth["clip_low"], truth["clip_high"], truth["clip_dual"]) > 0


@pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP))
def test_without_a_name_the_kernel_is_chosen_and_its_gradient_is_right(band):
    assert backends.choose(None, torch.device("cpu"), "plain_band").name == "cpu"
    case = batch(2, rows=3, width=6, poison=False)
    a, mask = case["advantages"], case["mask"]

    def loss(logp):
        given = tokenrl.objective("plain_ctpo", statistic="token", flow="through", cap=torch.inf)
        return tokenrl.policy_loss(given, logp, case["old_logp"], a, mask=mask)[0]

    assert torch.autograd.gradcheck(loss, case["logp"].clone().requires_grad_())


@pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP))
def test_in_a_graph_of_torch_compile(band):
    case = {name: x.float() if x.is_floating_point() else x for name, x in batch(3, poison=False).items()}

    def loss(logp):
        return tokenrl.policy_loss("plain_ctpo", logp, case["old_logp"], case["advantages"], mask=case["mask"])[0]

    logp = case["logp"].requires_grad_()
    eager, traced = loss(logp), torch.compile(loss, fullgraph=True, backend="aot_eager")(logp)
    assert torch.equal(eager, traced)
    assert torch.equal(*(torch.autograd.grad(x, logp)[0] for x in (eager, traced)))


@pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP))
def test_from_hidden_states(band):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).requires_grad_() for shape in ((2, 5, 8), (11, 8)))
    ids, a = torch.randint(0, 11, (2, 5), generator=g), torch.tensor([1.0, -1.0])
    old = tokenrl.linear_token_logprobs(hidden, weight, ids).logp.detach() - 0.1 * torch.randn(2, 5, generator=g)
    losses = [
        tokenrl.linear_policy_loss(row, hidden, weight, ids, old, a, backend=backend)[0]
        for row, backend in ((band[0], "cpu"), (band[1], "reference"))
    ]
    torch.testing.assert_close(*losses)
    for found, expected in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in losses), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP))
def test_what_is_built_is_kept(band, monkeypatch):
    for table in TABLES[:3]:
        table.pop("plain_band", None)
    monkeypatch.setattr(subprocess, "run", refused)
    tokenrl.fuse(PlainBand)
    assert "plain_band" in backends.CPU_GATES
    with pytest.raises(subprocess.SubprocessError, match="a compiler was called"):
        tokenrl.fuse(PlainCispo)
    assert "plain_cispo" not in GATES


@pytest.mark.skipif(NO_CPP is not None, reason=str(NO_CPP))
def test_a_compiler_that_fails_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="^gate 'plain_cispo': false does not compile it"):
        tokenrl.fuse(PlainCispo)
    assert not list(tmp_path.rglob("*.so"))


def gate(**changes):
    """A gate of a class of its own."""
    return tokenrl.parametrised(type("Own", (PlainCispo,), {"name": "own", "clipped": tokenrl.Gate.clipped} | changes))


def of_value(value):
    return gate(value=lambda self, s, x, logp, advantages, t: -advantages * value(s, t))


def test_it_is_a_decorator(without_cpp):
    own = of_value(lambda s, t: s)
    assert tokenrl.fuse(own) is own and GATES["own"] is own
    with pytest.raises(RuntimeError, match="it has no kernel of the gate 'own': no C.. compiler: install g.. or set"):
        backends.choose("cpu", torch.device("cpu"), "own")


REFUSED = {
    "another op": (lambda s, t: torch.erf(s), r"got torch.erf in line \d+ of test_fuse.py: .*torch.erf.*, accepted: "),
    "a sum over tokens": (lambda s, t: s - s.mean(), "got torch.mean in line"),
    "a branch": (lambda s, t: s if s.min() > 0 else t, "got torch.min in line"),
    "a number": (lambda s, t: s * float(s[0]), "got torch.select in line"),
    "in place": (lambda s, t: s.add_(1), "got torch.add_ in line"),
    "an odd power": (lambda s, t: s**1.3, "got the power 1.3 in line"),
    "a power by a tensor": (lambda s, t: t**s + s**t, "got a power by what is no number in line"),
    "a cast": (lambda s, t: s.bfloat16(), "got a cast to torch.bfloat16 in line"),
    "numbers from elsewhere": (lambda s, t: s + torch.eye(3)[0].double(), "got torch.eye in line"),
    "a derivative of its own": (lambda s, t: straight_through(s, s * s), "got the autograd.Function .*StraightThrough"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_traced_is_named(case, without_cpp):
    value, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^value of 'own': {message}"):
        tokenrl.fuse(of_value(value))
    assert "own" not in GATES


ERRORS = {
    "a name that is taken": ({"name": "ppo_clip"}, "got Own of the name 'ppo_clip', accepted: a name of its own"),
    "a name that is none": ({"name": "my gate"}, "got 'my gate', accepted: a name that is an identifier"),
    "other parameters": ({"params": lambda self: (1.0,)}, "got Own, whose params.. are not just its fields"),
    "a part without advantage": (
        {"value": lambda self, s, **more: s * s},
        "got 'own', whose value where A is 0 is off by .*, accepted: uses_advantages and vanishes",
    ),
    "many parameters": (
        {"__annotations__": dict.fromkeys("abcde", float), **dict.fromkeys("abcde", 1.0)},
        "got 7 parameters, accepted: at most 6",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_no_gate_to_fuse_is_named(case):
    changes, message = ERRORS[case]
    with pytest.raises(ValueError, match=f"^gate: {message}"):
        tokenrl.fuse(gate(**changes))


class FunctorAlone:
    """In place of a library: compiled in a second."""

    def __init__(self, name, source):
        self.values = cpp_values(name, {name: source})


WRONG = {
    "a derivative": ("exp", {"slope": lambda y, x, dx: dx}, "'s d_s"),
    "Triton's text": ("sub", {"triton": "{1} - {0}"}, "Triton's value"),
    "C++'s text": ("sub", {"cpp": "{1} - {0}"}, r"C\+\+'s value"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_of_the_table_is_noticed(case, monkeypatch, request):
    op, changes, message = WRONG[case]
    if reason := FUSED["cpu" if "C++" in case else "triton"]:
        pytest.skip(reason)
    if "C++" in case:
        monkeypatch.setattr(backends, "TRITON_REASON", "left out")
        monkeypatch.setattr(building, "library", FunctorAlone)
    else:
        request.getfixturevalue("without_cpp")
    monkeypatch.setitem(expressions.OPS, op, replace(expressions.OPS[op], **changes))
    with pytest.raises(RuntimeError, match=f"^gate 'own': .*{message}.* is off by .* where .* is allowed, at {{'s'"):
        tokenrl.fuse(of_value(lambda s, t: s.exp() - s * t))
    assert "own" not in GATES and "own" not in backends.CPU_GATES and "own" not in backends.TRITON_GATES
