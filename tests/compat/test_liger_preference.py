"""tokenrl.compat.liger's DPO beside the real Liger-Kernel's, which is plain torch."""

import itertools

import pytest
import torch

pytest.importorskip(
    "liger_kernel", reason="liger-kernel is not installed (make test installs it, without dependencies)"
)

from liger_kernel import chunked_loss

from tokenrl.compat import liger

PAIRS, T, V, D = 3, 5, 23, 8


def data():
    g = torch.Generator().manual_seed(0)
    shapes = ((2 * PAIRS, T, D), (V, D), (V,), (2 * PAIRS, T, D), (V, D), (V,))
    target = torch.randint(V, (2 * PAIRS, T), generator=g)
    target[torch.rand(target.shape, generator=g) < 0.3] = -100
    return [torch.randn(*shape, generator=g) for shape in shapes], target


def run(module, biased=True, **options):
    (hidden, weight, bias, *reference), target = data()
    leaves = [x.requires_grad_() for x in ([hidden, weight, bias] if biased else [hidden, weight])]
    if not options.get("use_ref_model", True):
        reference = []
    made = module.LigerFusedLinearDPOLoss(compiled=False, **options)
    loss, more = made(weight, hidden, target, bias if biased else None, *reference)
    return [loss.detach(), *(x.detach() for x in more), *torch.autograd.grad(1.3 * loss, leaves)]


SWITCHES = ("use_ref_model", "average_log_prob", "compute_nll_loss")
GRID = [dict(zip(SWITCHES, x, strict=True)) for x in itertools.product([False, True], repeat=3)]


@pytest.mark.parametrize(
    "options", [*GRID, {"beta": 0.7, "alpha": 0.3, "compute_nll_loss": True}, {"biased": False}], ids=str
)
def test_dpo(options):
    for found, expected in zip(run(liger, **options), run(chunked_loss, **options), strict=True):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 2e-5 * max(expected.abs().max(), 0.1)


def test_refused():
    with pytest.raises(ValueError, match="^loss_type: got 'hinge', accepted: sigmoid"):
        liger.LigerFusedLinearDPOLoss(loss_type="hinge")
    with pytest.raises(ValueError, match="^beta: got None"):
        liger.LigerFusedLinearDPOLoss(beta=None)
    (hidden, weight, *_), target = data()
    with pytest.raises(ValueError, match="^ref_input, ref_weight: got None"):
        liger.LigerFusedLinearDPOLoss()(weight, hidden, target)
    with pytest.raises(ValueError, match=r"^target: got shape \[5, 5\]"):
        liger.LigerFusedLinearDPOLoss()(weight, hidden[:5], target[:5])
