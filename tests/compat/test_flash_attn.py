"""tokenrl.compat.flash_attn beside what flash-attn's own kernels returned (tests/golden), and torch's cross entropy."""

import math

import pytest
import torch
from golden_data import INDEX, arrays

from tokenrl.compat import flash_attn

CASES = INDEX["flash_attn"]["cases"]
FP32 = [torch.float32, torch.float64]


def near(found, expected, rel=1e-6):
    """Recorded in fp32."""
    found = found.detach().double()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= rel * expected.abs().max() + 1e-12, (found, expected)


@pytest.mark.parametrize("dtype", FP32, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_recorded_losses(case, dtype):
    x = arrays("flash_attn", case)
    leaf = x["logits"].to(dtype).requires_grad_()
    losses, z_losses = flash_attn.cross_entropy_loss(leaf * 1, x["labels"], **CASES[case]["config"])
    assert losses.dtype == dtype and not z_losses.requires_grad
    near(losses, x["losses"])
    near(z_losses, x["z_losses"])
    near(torch.autograd.grad((losses * x["upstream"]).sum(), leaf)[0], x["grad_logits"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", ["defaults", "all"])
def test_the_recorded_module(case, reduction):
    x = arrays("flash_attn", case)
    for return_z_loss in (False, True):
        made = flash_attn.CrossEntropyLoss(reduction=reduction, return_z_loss=return_z_loss, **CASES[case]["config"])
        leaf = x["logits"].float().requires_grad_()
        out = made(leaf * 1, x["labels"])
        loss, z_loss = out if return_z_loss else (out, None)
        near(loss, x[f"{reduction}_loss"])
        if return_z_loss:
            near(z_loss, x[f"{reduction}_z_loss"])
        total = (loss * x["upstream"]).sum() if reduction == "none" else 1.3 * loss
        near(torch.autograd.grad(total, leaf)[0], x[f"{reduction}_grad_logits"])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_bf16_logits_and_ignored_rows(smoothing):
    """fp32 losses of the rounded logits; a row without a label holds nan, and its gradient is 0."""
    x = arrays("flash_attn", "defaults")
    logits, labels = x["logits"].bfloat16(), x["labels"]
    ignored = labels == -100
    truth = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(truth, labels, reduction="none", label_smoothing=smoothing)
    leaf = torch.where(ignored[:, None], math.nan, logits).requires_grad_()
    losses, _ = flash_attn.cross_entropy_loss(leaf, labels, label_smoothing=smoothing)
    assert losses.dtype == torch.float32
    near(losses, expected.detach())
    (grad,), (of_truth,) = (torch.autograd.grad(y.sum(), z) for y, z in ((losses, leaf), (expected, truth)))
    near(grad, of_truth, 1e-2)
    assert grad.dtype == torch.bfloat16 and not grad[ignored].any()


def test_in_place_where_autograd_cannot_notice():
    x = arrays("flash_attn", "in_place")
    leaf = x["logits"].float().requires_grad_()
    for logits, written in ((leaf * 1, True), (leaf, False)):
        before = logits.detach().clone()
        losses, _ = flash_attn.cross_entropy_loss(logits, x["labels"], lse_square_scale=0.01, inplace_backward=True)
        (losses * x["upstream"]).sum().backward()
        assert torch.equal(logits, before) != written
        near(leaf.grad, x["grad_logits"])
        leaf.grad = None


def test_no_label_at_all():
    leaf = torch.randn(3, 5, requires_grad=True)
    loss = flash_attn.CrossEntropyLoss(label_smoothing=0.1)(leaf, torch.full((3,), -100))
    assert loss == 0 and not torch.autograd.grad(loss, leaf)[0].any()


REFUSED = [
    ({"process_group": object()}, "process_group: got a object, accepted: None"),
    ({"precomputed_lse": torch.ones(2)}, "precomputed_lse: got a torch.Tensor"),
    ({"label_smoothing": -0.1}, "label_smoothing: got -0.1"),
    ({"logit_scale": 0.0}, "logit_scale: got 0.0"),
    ({"lse_square_scale": None}, "lse_square_scale: got None"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused(options, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        flash_attn.cross_entropy_loss(torch.ones(2, 5), torch.zeros(2, dtype=torch.int64), **options)
    with pytest.raises(ValueError, match="^reduction: got 'avg'"):
        flash_attn.CrossEntropyLoss(reduction="avg")
