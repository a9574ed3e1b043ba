"""The objective and the statistics give a sequence the same bits whatever padding lies around it."""

import pytest
import torch
from cases import PAIRS, device_of, gates_under_test, interpreted, kernel_backends, thinned

import tokenrl

EVERY_KERNEL = pytest.mark.parametrize("backend", kernel_backends())
PADDING = [(5, 0), (0, 1), (0, 5), (3, 100), (0, 512)]


def rows(width, seed=2):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(3, width, generator=g) * 3
    old_logp = logp + 0.3 * torch.randn(3, width, generator=g)
    holes = torch.rand(3, width, generator=g) > 0.1
    holes[:, 0] = holes[:, -1] = True
    return logp, old_logp, holes


def padded(x, left, right, value):
    return torch.nn.functional.pad(x, (left, right), value=value)


def width_of(backend):
    return 70 if interpreted(backend) else 700


@pytest.mark.parametrize(
    "statistic,flow,backend", [(*pair, b) for b in kernel_backends() for pair in thinned(PAIRS, b)]
)
def test_padding_changes_no_bit_of_the_gradient(statistic, flow, backend):
    gate = gates_under_test()["log_band"]
    objective = tokenrl.Objective("made", statistic, gate, "token-sum", "test", flow=flow, cap=1.0)
    logp, old_logp, mask = rows(width_of(backend))
    advantages = torch.tensor([1.0, -0.5, 2.0])

    def run(left=0, right=0, **more):
        x, old = (padded(y, left, right, torch.nan) for y in (logp, old_logp))
        x, old, valid = (y.to(device_of(backend)) for y in (x, old, padded(mask, left, right, False)))
        x.requires_grad_()
        more = {name: y.to(x.device) for name, y in more.items()}
        loss, metrics = tokenrl.policy_loss(
            objective, x, old, advantages.to(x.device), mask=valid, backend=backend, **more
        )
        grad = torch.autograd.grad(loss, x)[0].cpu()
        assert not grad[:, :left].any() and not grad[:, left + logp.shape[1] :].any()
        return loss.item(), grad[:, left : left + logp.shape[1]], metrics.raw.cpu()

    loss, grad, raw = run()
    for left, right in PADDING[: 3 if interpreted(backend) else 5]:
        other_loss, other, other_raw = run(left, right)
        assert torch.equal(grad, other), (left, right)
        if backend in ("cpu", "sim"):  # a block of Triton is as long as the mean sequence where nothing is added up
            assert loss == other_loss and torch.equal(raw, other_raw), (left, right)
    if backend == "triton" and statistic.startswith("span"):
        return  # which adds up a whole sequence and the segments of one in different orders
    assert torch.equal(grad, run(segment_ids=torch.zeros(logp.shape, dtype=torch.int64))[1])


@EVERY_KERNEL
@pytest.mark.parametrize("kind", ["sum", "mean", "min"])
def test_padding_changes_no_bit_of_a_statistic(kind, backend):
    logp, old_logp, mask = rows(width_of(backend))

    def run(left=0, right=0):
        x, old = (padded(y, left, right, torch.nan).to(device_of(backend)) for y in (logp, old_logp))
        valid = padded(mask, left, right, False).to(x.device)
        flow = "local" if kind == "min" else "through"
        s = tokenrl.prefix_ratio(x.requires_grad_(), old, kind=kind, flow=flow, mask=valid, backend=backend)
        (grad,) = torch.autograd.grad((s * s).sum(), x)
        found = torch.stack([s.detach(), grad]).cpu()
        assert not found[..., :left].any() and not found[..., left + logp.shape[1] :].any()
        return found[..., left : left + logp.shape[1]]

    for left, right in PADDING[: 3 if interpreted(backend) else 5]:
        assert torch.equal(run(), run(left, right)), (left, right)


@EVERY_KERNEL
def test_a_sequence_without_a_valid_token_among_others(backend):
    logp, old_logp, mask = (x.to(device_of(backend)) for x in rows(20))
    mask[1], logp[1], advantages = False, torch.nan, torch.ones(3, device=logp.device)
    loss, _ = tokenrl.policy_loss("ctpo", logp.requires_grad_(), old_logp, advantages, mask=mask, backend=backend)
    (grad,) = torch.autograd.grad(loss, logp)
    assert loss.isfinite() and not grad[1].any() and grad[0].any()
