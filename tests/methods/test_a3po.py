"""The interpolated proximal policy, typed out, and decoupled PPO with it."""

import math

import pytest
import torch

import tokenrl

LOGP, OLD = torch.tensor([-0.5, -1.0, -2.0, -0.25, -3.0]), torch.tensor([-0.75, -2.0, -1.5, -1.25, -3.5])
VERSIONS = torch.tensor([6, 5, 2, -1, 7])
SHARES = [0.0, 1 / 2, 4 / 5, 0.0, 0.0]  # of a policy 7: one step behind it is the proximal policy itself


def test_proximal_logp():
    found = {
        mean: tokenrl.proximal_logp(LOGP.double(), OLD.double(), VERSIONS, 7, mean=mean)
        for mean in ("geometric", "arithmetic")
    }
    for i, share in enumerate(SHARES):
        new, old = LOGP[i].item(), OLD[i].item()
        assert found["geometric"][i].item() == pytest.approx((1 - share) * old + share * new, rel=1e-14)
        p = (1 - share) * math.exp(old) + share * math.exp(new)
        assert found["arithmetic"][i].item() == pytest.approx(math.log(p), rel=1e-14)
    infinite = tokenrl.proximal_logp(LOGP - math.inf, OLD, VERSIONS, 7, mean="arithmetic")
    assert infinite.dtype == torch.float32 and infinite.isfinite().all()
    kept = tokenrl.proximal_logp(LOGP - math.inf, OLD, VERSIONS, 7).isfinite()
    assert kept.tolist() == [share == 0 for share in SHARES]
    assert tokenrl.proximal_logp(LOGP[:0], OLD[:0], VERSIONS[:0], 7).shape == (0,)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_a_token_that_the_rollout_could_not_sample(mean):
    """Of probabilities 0 and p: 0^(1 - a) p^a = 0, and a p."""
    versions, nothing = torch.tensor([5, 5, 7]), torch.tensor([-torch.inf] * 3)
    found = tokenrl.proximal_logp(torch.tensor([-1.0, -torch.inf, -1.0]), nothing, versions, 7, mean=mean)
    expected = [-1 + math.log(0.5) if mean == "arithmetic" else -math.inf, -math.inf, -math.inf]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_decoupled_ppo():
    """-A w r with w = p_prox / p_old, truncated at 2, r = p / p_prox, inside the clip of r."""
    logp, old, a = (x.double()[None] for x in (LOGP, OLD, torch.ones(1)))
    prox = tokenrl.proximal_logp(logp, old, VERSIONS[None], 7)
    leaf = logp.clone().requires_grad_()
    loss, _ = tokenrl.policy_loss("ppo", leaf, prox, a[0], rollout_logp=old, backend="reference")
    (gradient,) = torch.autograd.grad(loss, leaf)
    total = 0.0
    for i in range(5):
        r, w = math.exp(logp[0, i] - prox[0, i]), min(math.exp(prox[0, i] - old[0, i]), 2.0)
        total -= w * min(r, 1.2) / 5
        assert gradient[0, i].item() == pytest.approx(-w * r / 5 if r <= 1.2 else 0.0, rel=1e-12)
    assert loss.item() == pytest.approx(total, rel=1e-12)


ERRORS = [
    (lambda: tokenrl.proximal_logp(LOGP, OLD, VERSIONS.float(), 7), "versions: got dtype torch.float32"),
    (lambda: tokenrl.proximal_logp(LOGP, OLD, VERSIONS[:2], 7), r"versions: got \[2\] on cpu, accepted: \[5\] on cpu"),
    (lambda: tokenrl.proximal_logp(LOGP, OLD, VERSIONS, 7.0), "current_version: got 7.0, accepted: an integer"),
    (lambda: tokenrl.proximal_logp(LOGP, OLD, VERSIONS, 7, mean="linear"), "mean: got 'linear', accepted: geometric"),
    (lambda: tokenrl.proximal_logp(LOGP.bfloat16(), OLD, VERSIONS, 7), "logp: got dtype torch.bfloat16"),
]


@pytest.mark.parametrize("call,message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
