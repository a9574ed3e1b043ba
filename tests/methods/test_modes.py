"""modes: the switch between two modes, value and gradient, and DeGRPO's loss by its weights, errors."""

import pytest
import torch

import tokenrl
from tokenrl import modes

LOGITS = torch.tensor([[0.3, -1.0], [2.0, 0.1], [-0.4, 0.9]], dtype=torch.float64)
PREFERS = torch.tensor([True, False, True])


@pytest.mark.parametrize("kind", ["sigmoid", "hinge"])
def test_mode_switch(kind):
    logits = LOGITS.clone().requires_grad_()
    found = modes.mode_switch_loss(logits, PREFERS, kind=kind, margin=2.0)
    d = torch.tensor([1.3, -1.9, -1.3], dtype=torch.float64)
    expected, slope = {
        "sigmoid": ((1 + (-d).exp()).log(), -1 / (1 + d.exp())),
        "hinge": (2 - d, -torch.ones(3, dtype=torch.float64)),
    }[kind]
    torch.testing.assert_close(found, expected)
    sign = torch.tensor([1.0, -1.0, 1.0]) * slope
    torch.testing.assert_close(torch.autograd.grad(found.sum(), logits)[0], torch.stack([sign, -sign], 1))
    assert modes.mode_switch_loss(LOGITS[:1], PREFERS[:1], kind="hinge", margin=1.0) == 0  # 1.3 is far enough


def test_two_logits_from_hidden_states():
    """No other row of the head gets a gradient."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 5, generator=g), torch.randn(11, 5, generator=g).requires_grad_()
    logits = hidden @ weight[[7, 2]].t()
    (grad,) = torch.autograd.grad(modes.mode_switch_loss(logits, PREFERS).mean(), weight)
    assert grad.any(1).nonzero().flatten().tolist() == [2, 7]


@pytest.mark.parametrize("alpha", [1e-3, 0.5])
def test_degrpo(alpha):
    """Thinkless's loss: alpha masked_mean(of the control tokens) + masked_mean(of the rest)."""
    g = torch.Generator().manual_seed(1)
    logp, old_logp = (-torch.rand(4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(4, 6, generator=g) > 0.3
    mask[:, 0], mask[3] = True, False
    advantages, control = torch.tensor([1.0, -1.0, 0.5, 2.0]), torch.zeros(4, 6, dtype=torch.bool)
    control[:, 0] = True
    logp.requires_grad_()
    ratio = (logp - old_logp).exp()
    a = advantages[:, None].double()
    losses = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    expected = alpha * losses[mask & control].mean() + losses[mask & ~control].mean()
    weight = modes.degrpo_weights(control, alpha=alpha, mask=mask)
    how = {"token_weight": weight, "aggregation": "token-sum"}
    loss, _ = tokenrl.policy_loss("grpo", logp, old_logp, advantages, mask=mask, **how)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(x, logp)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    assert torch.equal(modes.degrpo_weights(control[mask], alpha=alpha, cu_seqlens=boundaries), weight[mask])
    assert not weight[~mask].any() and not modes.degrpo_weights(control, mask=torch.zeros_like(mask)).any()


ERRORS = {
    "kind": (lambda: modes.mode_switch_loss(LOGITS, PREFERS, kind="log"), "kind: got 'log', accepted: sigmoid, hinge"),
    "logits": (lambda: modes.mode_switch_loss(LOGITS.t(), PREFERS), r"logits: got .*\[2, 3\], accepted: \[S, 2\]"),
    "prefers": (lambda: modes.mode_switch_loss(LOGITS, PREFERS.long()), r"prefers_first: got .*accepted: bool \[3\]"),
    "bf16": (lambda: modes.mode_switch_loss(LOGITS.bfloat16(), PREFERS), "logits: got dtype torch.bfloat16"),
    "control": (lambda: modes.degrpo_weights(LOGITS), "control_mask: got dtype torch.float64, accepted: torch.bool"),
    "alpha": (lambda: modes.degrpo_weights(LOGITS > 0, alpha=-1), "alpha: got -1, accepted: a number, at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
