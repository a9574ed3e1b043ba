"""M2PO's threshold and masks against their definition in loops, and what a batch may look like."""

import math

import pytest
import torch

import tokenrl
from tokenrl import m2po

VALID = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1]]).bool()
ENDS = torch.tensor([0, 4, 10, 10, 14])


def batch(seed=0, garbage=math.nan, scale=0.3):
    """(logp, old_logp, advantages [S] with one of 0)."""
    g = torch.Generator().manual_seed(seed)
    logp, step = (torch.randn(VALID.shape, generator=g, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(4, generator=g, dtype=torch.float64)
    advantages[3] = 0 if seed % 2 else advantages[3]
    return torch.where(VALID, logp, garbage), torch.where(VALID, logp - scale * step, -garbage), advantages


def harmful(logp, old, a):
    return [
        (i, j) for i, j in VALID.nonzero().tolist() if a[i] * (logp[i, j] - old[i, j]) > 0
    ]  # fmt: skip


def capped(squares, tau):
    return math.fsum(min(x, tau**2) for x in squares) / len(squares)


@pytest.mark.parametrize("budget", [0.0, 0.001, 0.02, 0.04, 1.0])
def test_threshold(budget):
    for seed in range(6):
        logp, old, a = batch(seed)
        squares = sorted(((logp - old)[cell] ** 2).item() for cell in harmful(logp, old, a))
        expected = math.inf
        if math.fsum(squares) / len(squares) > budget:
            within = [x for x in squares if capped(squares, math.sqrt(x)) < budget]
            expected = math.sqrt(max(within, default=0.0))
        found = m2po.m2po_threshold(logp, old, a, budget=budget, mask=VALID)
        assert found.item() == pytest.approx(expected, rel=1e-12) and found.shape == ()


def test_the_method():
    """Between the bounds PPO's gradient, beyond them none; the bounds no narrower than the least."""
    logp, old, a = batch(2, scale=0.8)
    tau = m2po.m2po_threshold(logp, old, a, mask=VALID)
    eps_low, eps_high = m2po.m2po_bounds(tau, old, least_low=0.01, least_high=0.01)
    assert eps_low.shape == eps_high.shape == old.shape and 0.01 < eps_low[0, 0] < 0.5
    row, leaf = tokenrl.objective("ppo", eps_low=eps_low, eps_high=eps_high), logp.clone().requires_grad_()
    loss, _ = tokenrl.policy_loss(row, leaf, old, a, mask=VALID, backend="reference")
    (gradient,) = torch.autograd.grad(loss, leaf)
    total, n = 0.0, VALID.sum().item()
    for i, j in VALID.nonzero().tolist():
        x, advantage = (logp - old)[i, j].item(), a[i].item()
        far = advantage * x > 0 and abs(x) > tau
        total -= advantage * math.exp(math.copysign(tau, x) if far else x) / n
        if abs(abs(x) - tau) > 1e-12:  # tau is a token's
            assert gradient[i, j].item() == pytest.approx(0 if far else -advantage * math.exp(x) / n, rel=1e-9)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    low, high = m2po.m2po_bounds(math.inf, old.float())
    assert low.dtype == torch.float32 and low[0, 0] == 1 and high[0, 0] == math.inf
    assert [x[0, 0].item() for x in m2po.m2po_bounds(tau * 0, old)] == [0.3, 0.5]


@pytest.mark.parametrize("which", ["harmful", "all"])
@pytest.mark.parametrize("budget", [0.0, 0.004, 0.04, 1.0])
def test_mask(budget, which):
    for seed in range(4):
        logp, old, a = batch(seed)
        cells = harmful(logp, old, a) if which == "harmful" else [tuple(c) for c in VALID.nonzero().tolist()]
        rest = sorted(cells, key=lambda cell: (logp - old)[cell].square().item())
        while rest and math.fsum((logp - old)[c].square().item() for c in rest) / len(rest) > budget:
            if len(rest) == 1 and which == "all":
                break
            rest.pop()
        expected = VALID.clone()
        for cell in cells:
            expected[cell] = cell in rest
        given = (a,) if which == "harmful" else ()
        assert torch.equal(m2po.m2po_mask(logp, old, *given, budget=budget, mask=VALID), expected)


def test_packed_per_token_and_none():
    logp, old, a = batch(1)
    pack = [x[VALID] for x in (logp, old)]
    per_token = torch.where(VALID, a[:, None], math.nan)
    tau, keep = (f(logp, old, a, mask=VALID) for f in (m2po.m2po_threshold, m2po.m2po_mask))
    assert m2po.m2po_threshold(*pack, a, cu_seqlens=ENDS) == tau
    assert m2po.m2po_threshold(logp, old, per_token, mask=VALID) == tau
    assert torch.equal(m2po.m2po_mask(*pack, a, cu_seqlens=ENDS), keep[VALID])
    assert torch.equal(m2po.m2po_mask(logp.float(), old.float(), a.float(), mask=VALID), keep)
    nothing = torch.zeros_like(VALID)
    assert m2po.m2po_threshold(logp, old, a, mask=nothing) == math.inf
    assert not m2po.m2po_mask(logp, old, mask=nothing).any()
    assert m2po.m2po_mask(logp[:0], old[:0]).shape == (0, 6)
    assert m2po.m2po_threshold(logp[:0], old[:0], a[:0]) == math.inf


ERRORS = [
    (lambda x, y, a: m2po.m2po_mask(x.requires_grad_(), y), "logp: got a tensor that requires grad"),
    (lambda x, y, a: m2po.m2po_mask(x, y, budget=-1.0), "budget: got -1.0, accepted: a number, at least 0"),
    (lambda x, y, a: m2po.m2po_threshold(x, y.bfloat16(), a), "old_logp: got dtype torch.bfloat16"),
    (lambda x, y, a: m2po.m2po_threshold(x, y, a[:2]), r"advantages: got shape \[2\]"),
    (lambda x, y, a: m2po.m2po_bounds(x, y), r"threshold: got a tensor of shape \[4, 6\]"),
    (lambda x, y, a: m2po.m2po_bounds(0.1, y, least_low=2), "least_low: got 2"),
]


@pytest.mark.parametrize("call,message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(*batch())
