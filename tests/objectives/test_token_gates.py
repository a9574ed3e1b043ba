"""Gates with one value per token, and gates beside forms: their formulas typed out in floats and loops, value and
gradient, on every backend."""

import math

import pytest
import torch
from by_loops import called, clipped, made, ratios, same
from cases import backends_to_test, device_of, gates_under_test

import tokenrl
from tokenrl.objectives.gates.bounded import PpoNtp, Ratio
from tokenrl.objectives.gates.weighted import Cispo, Quadratic, Reinforce

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())


@EVERY_BACKEND
def test_hapo(backend):
    case, cells = made(5)
    g = torch.Generator().manual_seed(1)
    score = torch.rand(case["mask"].shape, generator=g, dtype=torch.float64) * 2 - 1
    d, loss, gradient = ratios(case, cells), 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64)
    for cell in cells:
        a, h, r = case["advantages"][cell[0]].item(), score[cell].item(), math.exp(d[cell])
        low, high = (0.2 * (1 - 0.7 * h), 0.25) if h <= 0 else (0.2, 0.25 * (1 + 0.7 * h))
        inside = 1 - low / 2 < r < 1 + high / 2
        if (h > 0 and not inside) or (h <= 0 and inside):
            a *= 1 + 0.9 * h
        value, slope = clipped(r, a, 1 - low, 1 + high)
        if a < 0 and value > -a * 1.5:
            value, slope = -a * 1.5, 0.0
        loss += value / len(cells)
        gradient[cell] = slope / len(cells)
    row = tokenrl.objective(
        "hapo", eps_low=0.2, eps_high=0.25, dual=1.5, alpha=0.7, beta=0.9, score=score.to(device_of(backend))
    )
    same(called(row, case, backend), loss, gradient)


@EVERY_BACKEND
def test_rmt(backend):
    """Two sets of tokens in one pass: reinforcement on one, next-token prediction on the other."""
    case, cells = made(6)
    rl = torch.arange(case["mask"].shape[1]) % 2 == 0
    case["advantages"] = torch.where(rl, case["advantages"][:, None], 0.0)
    ntp = (0.1 * (~rl).double()).expand(case["mask"].shape).contiguous()
    d, loss, gradient = ratios(case, cells), 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64)
    for cell in cells:
        value, slope = clipped(math.exp(d[cell]), case["advantages"][cell].item())
        if not rl[cell[1]]:
            assert slope == 0
            value, slope = -0.1 * case["logp"][cell].item(), -0.1
        loss += value / len(cells)
        gradient[cell] = slope / len(cells)
    row = tokenrl.objective("rmt", ntp=ntp.to(device_of(backend)))
    same(called(row, case, backend), loss, gradient)
    # A plain sum over the tokens to predict: under any aggregation, each of them as it is.
    for mode in ("token-mean", "seq-mean-token-mean"):
        found = called(tokenrl.objective(row, ntp_reduction="sum", aggregation=mode), case, backend)
        plain = called(tokenrl.objective(row, ntp=0.0, aggregation=mode), case, backend)
        valid = case["mask"]
        added = torch.where(valid, -ntp * case["logp"], 0).sum()
        same(found, (plain[0] + added).item(), plain[1] - torch.where(valid, ntp, 0))


@EVERY_BACKEND
def test_topr_split_by_the_reward(backend):
    """ROLL: a row that was rewarded is not importance-weighted, whatever the sign of its advantage."""
    case, cells = made(9)
    case["advantages"][2] = -0.7
    reward = torch.tensor([1.0, 0.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    d, loss, gradient = ratios(case, cells), 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64)
    for cell in cells:
        a = case["advantages"][cell[0]].item() / len(cells)
        w = 1.0 if reward[cell[0]] > 0 else min(math.exp(d[cell]), 1.0)
        loss += -w * a * case["logp"][cell].item()
        gradient[cell] = -w * a
    score = reward[:, None].expand(case["mask"].shape).contiguous().to(device_of(backend))
    row = tokenrl.objective("topr_roll", score=score, aggregation="token-mean")
    found = called(row, case, backend)
    same(found, loss, gradient)
    assert found[2].clip_low == pytest.approx(sum(reward[i] <= 0 and d[i, j] > 0 for i, j in cells) / len(cells))
    plain = called(tokenrl.objective(row, score=None), case, backend)
    assert not torch.equal(plain[1], found[1])


@EVERY_BACKEND
def test_dppo_with_a_given_divergence(backend):
    case, cells = made(7)
    g = torch.Generator().manual_seed(2)
    far = torch.rand(case["mask"].shape, generator=g, dtype=torch.float64) * 0.3
    d, loss, gradient = ratios(case, cells), 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64)
    dropped = 0
    for cell in cells:
        a, r, logp = case["advantages"][cell[0]].item(), math.exp(d[cell]), case["logp"][cell].item()
        outwards = r > 1 if a > 0 else r < 1
        w = 0.0 if outwards and far[cell] > (0.1 if a > 0 else 0.2) else min(r, 1.3)
        dropped += w == 0
        loss += -w * a * logp / len(cells)
        gradient[cell] = -w * a / len(cells)
    assert 0 < dropped < len(cells)
    row = tokenrl.objective(
        "dppo_topk", eps_low=0.2, eps_high=0.1, ceiling=1.3, divergence=far.to(device_of(backend)),
        aggregation="token-mean",
    )  # fmt: skip
    same(called(row, case, backend), loss, gradient)


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo_reads_the_old_policy_however_far_it_is(name, backend):
    """The old probability is e^old_logp, not that of a bounded ratio: of four tokens one is kept."""
    logp = torch.tensor([[-25.1, -0.5], [-0.1, -0.3]], dtype=torch.float64, device=device_of(backend))
    old_logp = torch.tensor([[-0.1, -0.6], [-45.0, -math.inf]], dtype=torch.float64, device=logp.device)
    advantages = torch.tensor([-1.0, 1.0], dtype=torch.float64, device=logp.device)
    row = tokenrl.objective(name, aggregation="token-mean")
    loss, metrics = tokenrl.policy_loss(row, logp.requires_grad_(), old_logp, advantages, backend=backend)
    gradient = torch.autograd.grad(loss, logp)[0].tolist()
    assert gradient == [[0, pytest.approx(math.exp(0.1) / 4)], [0, 0]]
    assert loss.item() == pytest.approx(-0.5 * math.exp(0.1) / 4)
    assert (metrics.clip_low, metrics.clip_high, metrics.clip_dual) == (0.25, 0.5, 0)


@EVERY_BACKEND
def test_cppo_with_a_given_divergence_is_dppo_without_a_budget(backend):
    """delta_b so large that no prefix binds, w_min = 1: Z_t <= delta alone decides."""
    case, _ = made(8)
    far = (case["logp"].exp() - case["old_logp"].exp()).abs()
    row = tokenrl.objective(
        "cppo", delta=0.05, delta_b=1e9, w_min=1.0, quantile=None, divergence=far.to(device_of(backend))
    )
    found = called(row, case, backend)
    mask, d = case["mask"], torch.where(case["mask"], case["logp"] - case["old_logp"], 0)
    a = case["advantages"][:, None]
    kept = mask & ((a * d <= 0) | (far <= 0.05))
    n = mask.sum()
    loss = torch.where(kept, -a * d.exp(), 0).sum() / n
    same(found, loss.item(), torch.where(kept, -a * d.exp(), 0) / n)
    assert 0 < kept.sum() < n


@EVERY_BACKEND
@pytest.mark.parametrize("form", ["gmpo", "hmpo", "fiberpo"])
def test_a_gate_of_logp_beside_a_form_that_replaces_the_ratio(form, backend):
    """The form's ratio is the weight, the gradient is that of the log-prob itself."""
    case, cells = made(4)
    case["advantages"][1] = 0.5
    valid, a = case["mask"], case["advantages"][:, None]
    plain = called(tokenrl.objective(form, gate=Reinforce(), aggregation="token-mean"), case, backend)
    expected = torch.where(valid, -a * case["logp"], 0).sum().item() / len(cells)
    same(plain, expected, torch.where(valid, -a / len(cells), 0))
    weighed = called(tokenrl.objective(form, gate=Cispo(), aggregation="token-mean"), case, backend)
    ratio = called(tokenrl.objective(form, gate=Ratio(), aggregation="token-mean"), case, backend)
    # Of one ratio for all tokens of a row, -A r logp has the sum of -A r for its slope.
    of_row = [torch.where(valid, x, 0).sum(1) for x in (weighed[1], -a * torch.ones_like(case["logp"]) / len(cells))]
    r = torch.where(valid.any(1), of_row[0] / of_row[1], 0)
    loss = (of_row[1] * r).sum()
    torch.testing.assert_close(ratio[0], loss, rtol=1e-9, atol=1e-12)
    if form != "fiberpo":
        same(weighed, torch.where(valid, -a * r[:, None] * case["logp"], 0).sum().item() / len(cells),
             torch.where(valid, -a * r[:, None] / len(cells), 0))  # fmt: skip
    for gate in (Quadratic(), PpoNtp()):
        with pytest.raises(ValueError, match=f"^gate: got {type(gate).__name__}, whose loss has a slope in the ratio"):
            tokenrl.objective(form, gate=gate)


def test_slopes_are_what_gates_say():
    s, x, logp = (torch.full((1,), v, dtype=torch.float64, requires_grad=True) for v in (0.03, 0.04, -1.0))
    for name, gate in gates_under_test().items():
        value = gate.value(s, x, logp, torch.full((1,), -0.7, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        found = torch.autograd.grad(value, (s, x, logp), allow_unused=True)
        found = [part is not None and bool(part.any()) for part in found]
        assert ("s" in gate.slopes, "logp" in gate.slopes) == (found[0] or found[1], found[2]), name
