"""An objective that a user writes: registered by name, on the reference and on Triton; and its example."""

import math
import os
import subprocess
import sys

import pytest
import torch
from cases import batch, device_of, run, to_rounding
from paths import ROOT
from registered import restored

import tokenrl
from tokenrl.fusion.building import why_not_cpp
from tokenrl.instruments.parity import close
from tokenrl.objectives.gates.bounded import PpoClip
from tokenrl.ops import backends

EXAMPLE = ROOT / "examples" / "own_objective.py"


@tokenrl.parametrised
class Hinge(tokenrl.Gate):
    """l = -A min(s, width t^0.5) for either sign of A."""

    name = "hinge"
    width: float = 0.1

    def value(self, s, x, logp, advantages, t):
        return -advantages * torch.minimum(s, self.width * t.sqrt())


@pytest.fixture
def hinge():
    with restored():
        yield tokenrl.register(tokenrl.Objective("hinge", "prefix_sum", Hinge(), "token-mean", "a test", flow="local"))


def test_the_example_runs():
    done = subprocess.run(
        [sys.executable, EXAMPLE],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "reference: loss" in done.stdout
    for name, reason in (("cpu", why_not_cpp()), ("triton", backends.TRITON_REASON)):
        assert reason or f"the kernel of {name} has the gradient of the reference" in done.stdout


def test_by_name_it_runs_on_the_reference_with_autograd(hinge):
    case = batch(0, poison=False)
    del case["segment_ids"], case["group_ids"]
    loss, grad, _ = run("hinge", case, "reference", torch.float64)
    chosen, own, _ = run(tokenrl.objective("hinge", width=0.1), case, None, torch.float64)
    to_rounding(loss, chosen)
    to_rounding(grad, own)
    mask, a, w = case["mask"], case["advantages"][:, None], case["token_weight"]
    s = torch.where(mask, case["logp"] - case["old_logp"], 0).cumsum(1)
    t = mask.cumsum(1).double()
    n = mask.sum()
    expected = torch.where(mask, w * -a * torch.minimum(s, 0.1 * t.sqrt()), 0).sum() / n
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    slope = torch.where(mask & (s < 0.1 * t.sqrt()), w * -a, 0) / n
    torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-15)


def check_without_advantage(backend):
    """A token of none has no part in the loss: nor have 0 times an infinite value and slope."""
    old = torch.tensor([[-1.0, -1.0], [-math.inf, -1.0]], dtype=torch.float64)
    case = {"logp": torch.full_like(old, -1.0), "old_logp": old, "advantages": torch.tensor([1.0, 0.0]).double()}
    loss, grad, _ = run(tokenrl.objective("hinge", width=math.inf, clamp=math.inf), case, backend, torch.float64)
    assert loss == 0 and grad.tolist() == [[-0.25, -0.25], [0, 0]]


def test_a_token_without_advantage_has_no_part(hinge):
    check_without_advantage("reference")


def test_from_hidden_states(hinge):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).requires_grad_() for shape in ((2, 5, 8), (11, 8)))
    ids, a = torch.randint(0, 11, (2, 5), generator=g), torch.tensor([1.0, -1.0])
    stats = tokenrl.linear_token_logprobs(hidden, weight, ids, backend="reference")
    old = stats.logp.detach() - 0.1 * torch.randn(2, 5, generator=g)
    expected, _ = tokenrl.policy_loss("hinge", stats.logp, old, a)
    loss, _ = tokenrl.linear_policy_loss("hinge", hidden, weight, ids, old, a)
    torch.testing.assert_close(loss, expected)
    for got, truth in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(got, truth)


def test_a_backend_without_its_kernel_says_so(hinge):
    for name, backend in backends.BACKENDS.items():
        if backend.namespace is None or backend.why_not(device_of(name)):
            continue
        with pytest.raises(RuntimeError, match="it has no kernel of the gate 'hinge'"):
            run("hinge", batch(0), name, torch.float32)


@pytest.mark.skipif(backends.TRITON_REASON is not None, reason=str(backends.TRITON_REASON))
def test_given_its_function_it_runs_on_triton(hinge):
    if reason := backends.BACKENDS["triton"].why_not(device_of("triton")):
        pytest.skip(reason)
    import own_gates

    tokenrl.register_triton(Hinge, own_gates.hinge)
    case = batch(3)
    base, truth, kernel = (
        run("hinge", case, *where)
        for where in (("reference", torch.float32), ("reference", torch.float64), ("triton", torch.float32))
    )
    for got, exact, own in zip(kernel[:2], truth[:2], base[:2], strict=True):
        close(got, exact, own)
    check_without_advantage("triton")
    with pytest.raises(ValueError, match="^gate: got 'hinge', accepted: a gate that has no Triton function yet"):
        tokenrl.register_triton(Hinge, own_gates.hinge)


def test_names_are_taken_once(hinge):
    with pytest.raises(ValueError, match="^name: got 'hinge', accepted: a name that is not in the table yet"):
        tokenrl.register(hinge)

    @tokenrl.parametrised
    class Impostor(tokenrl.Gate):
        name = "ppo_clip"

    with pytest.raises(ValueError, match="^gate: got Impostor of the name 'ppo_clip'"):
        tokenrl.Objective("other", "token", Impostor(), "token-mean", "")

    @tokenrl.parametrised
    class Wider(PpoClip):
        eps_high: float = 0.5

    with pytest.raises(ValueError, match="^gate: got Wider of the name 'ppo_clip', accepted: a name of its own"):
        tokenrl.objective("ppo", gate=Wider())


@pytest.mark.skipif(backends.TRITON_REASON is not None, reason=str(backends.TRITON_REASON))
def test_triton_functions_are_of_registered_gates():
    @tokenrl.parametrised
    class Unknown(tokenrl.Gate):
        name = "unknown"

    with pytest.raises(ValueError, match="^gate: got Unknown, accepted: a gate of a registered objective"):
        tokenrl.register_triton(Unknown, None)
