"""Batches without segments and weights, a loss and its gradient on a backend, and their comparison: for formulas typed
out in floats and loops."""

import torch
from cases import batch, device_of

import tokenrl


def made(seed=0, **how):
    """(a batch without segments and weights, its valid tokens as (row, column))."""
    case = batch(seed, **how)
    for name in ("segment_ids", "token_weight"):
        del case[name]
    return case, [tuple(cell) for cell in case["mask"].nonzero().tolist()]


def called(objective, case, backend, **more):
    """(loss, gradient, metrics)."""
    case = {name: x.to(device_of(backend)) for name, x in case.items()} | more
    logp = case.pop("logp").requires_grad_()
    loss, metrics = tokenrl.policy_loss(
        objective, logp, case.pop("old_logp"), case.pop("advantages"), backend=backend, **case
    )
    return loss.detach().cpu(), torch.autograd.grad(loss, logp)[0].cpu(), metrics


def same(found, loss, gradient):
    torch.testing.assert_close(found[0], torch.tensor(loss, dtype=torch.float64), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(found[1], gradient, rtol=1e-11, atol=1e-14)


def ratios(case, cells):
    return {cell: (case["logp"][cell] - case["old_logp"][cell]).item() for cell in cells}


def clipped(r, a, low=0.8, high=1.2):
    """(PPO's loss, its slope in the log ratio)."""
    active = r <= high if a > 0 else r >= low
    return max(-a * r, -a * min(max(r, low), high)), -a * r * active
