"""tokenrl.compat.liger's cross entropies beside the real Liger-Kernel's, whose kernels are interpreted."""

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip(
    "liger_kernel", reason="liger-kernel is not installed (make test installs it, without dependencies)"
)

import triton.language as tl
from liger_kernel.ops import cross_entropy as kernels
from liger_kernel.transformers import cross_entropy, functional, fused_linear_cross_entropy

from tokenrl.compat import liger

N, V, D = 7, 23, 8
THEIRS = SimpleNamespace(
    LigerCrossEntropyLoss=cross_entropy.LigerCrossEntropyLoss,
    LigerFusedLinearCrossEntropyLoss=fused_linear_cross_entropy.LigerFusedLinearCrossEntropyLoss,
)


class Number(float):
    """A float that Liger's kernel may cast, as Triton's own numbers are and the interpreter's are not."""

    def to(self, dtype):
        return self


@pytest.fixture(autouse=True)
def tanh(monkeypatch):
    """libdevice's, which the interpreter has not."""
    monkeypatch.setattr(kernels, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


def data(ignore_index=-100, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (2 * torch.randn(*shape, generator=g) for shape in ((N, D), (V, D), (V,)))
    target = torch.randint(V, (N,), generator=g)
    target[torch.tensor([1, 4])] = ignore_index
    target[2] = (hidden @ weight.T + bias)[2].argmax()
    return [x.to(dtype) for x in (hidden, weight, bias)], target


def near(found, expected, rel=2e-5):
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None) and (x is None or x.shape == y.shape)
        assert x is None or (x - y).abs().max() <= rel * max(y.abs().max(), 0.1), (x, y)


def results(out, leaves):
    """loss, z loss, accuracy, then the gradients of the loss: under random weights where it is not reduced."""
    parts = [getattr(out, name, None) for name in ("z_loss", "token_accuracy")]
    loss = getattr(out, "loss", out)
    total = 1.3 * loss
    if loss.dim():
        total = (loss * torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))).sum()
    return [x if x is None else x.detach() for x in (loss, *parts)] + list(torch.autograd.grad(total, leaves))


def of_logits(module, dtype=torch.float32, **options):
    (hidden, weight, bias), target = data(options.get("ignore_index", -100), dtype)
    leaf = (hidden @ weight.T + bias).requires_grad_()
    return results(module.LigerCrossEntropyLoss(**options)(leaf * 1, target), [leaf])


def of_hidden(module, biased=True, **options):
    (hidden, weight, bias), target = data(options.get("ignore_index", -100))
    leaves = [x.requires_grad_() for x in ([hidden, weight, bias] if biased else [hidden, weight])]
    made = module.LigerFusedLinearCrossEntropyLoss(**options)
    return results(made(weight, hidden, target, bias if biased else None), leaves)


OPTIONS = {
    "defaults": {},
    "smoothed": {"label_smoothing": 0.2},
    "all smooth": {"label_smoothing": 1.0},
    "z loss": {"lse_square_scale": 0.01, "return_z_loss": True},
    "z loss, smoothed": {"lse_square_scale": 0.01, "label_smoothing": 0.1},
    "softcap": {"softcap": Number(3.0), "lse_square_scale": 0.01},
    "accuracy": {"return_token_accuracy": True},
    "another index": {"ignore_index": 5},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("of", [of_logits, of_hidden])
def test_values_and_gradients(of, name, reduction):
    how = {"reduction": reduction, **OPTIONS[name]}
    near(of(liger, **how), of(THEIRS, **how))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "lse_square_scale": 0.01}], ids=str)
def test_of_a_head(options):
    for more in ({"biased": False}, {"use_token_scaling": True}, {"accum_dtype": torch.float32}):
        near(of_hidden(liger, **more, **options), of_hidden(THEIRS, **more, **options))


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_functions(kind):
    (hidden, weight, bias), target = data()
    how = {"label_smoothing": 0.1, "lse_square_scale": 0.01, "return_z_loss": True, "reduction": "sum"}
    found = []
    for module in (liger, functional):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        if kind == "hidden":
            out = module.liger_fused_linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], **how)
        else:
            leaves = [(hidden @ weight.T).requires_grad_()]
            out = module.liger_cross_entropy(leaves[0] * 1, target, **how)
        found.append(results(out, leaves))
    near(*found)


def test_bf16_logits():
    """Liger stores bf16 losses; ours are fp32, of the same logits."""
    found, theirs = (of_logits(m, torch.bfloat16, reduction="none", label_smoothing=0.1) for m in (liger, THEIRS))
    assert found[0].dtype == torch.float32
    near([found[0]], [theirs[0].float()], 1e-2)
    near([found[-1].float()], [theirs[-1].float()], 1e-2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_rows_may_hold_anything(smoothing):
    (hidden, weight, bias), target = data()
    ignored, found = target == -100, []
    for fill in (0.0, math.nan):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        dirty = torch.where(ignored[:, None], fill, leaves[0])
        out = liger.LigerFusedLinearCrossEntropyLoss(label_smoothing=smoothing)(leaves[1], dirty, target, leaves[2])
        logits = torch.where(ignored[:, None], fill, (hidden @ weight.T).requires_grad_())
        more = liger.LigerCrossEntropyLoss(label_smoothing=smoothing)(logits, target)
        found.append([out.detach(), more.detach(), *torch.autograd.grad(out, leaves)])
        assert not torch.autograd.grad(more, logits)[0][ignored].any()
    near(*found)


def test_the_gradient_lies_in_the_logits_where_it_may():
    (hidden, weight, _), target = data()
    leaf = (hidden @ weight.T).requires_grad_()
    logits = leaf * 1
    before = logits.detach().clone()
    liger.LigerCrossEntropyLoss()(logits, target).backward()
    assert not torch.equal(logits, before)
    near([leaf.grad], [torch.autograd.grad(torch.nn.functional.cross_entropy(leaf, target), leaf)[0]])


def test_no_label_at_all():
    (hidden, weight, _), target = data()
    hidden.requires_grad_()
    loss = liger.LigerFusedLinearCrossEntropyLoss(label_smoothing=0.1)(weight, hidden, target.fill_(-100))
    assert loss == 0 and not torch.autograd.grad(loss, hidden)[0].any()


REFUSED = [
    ({"weight": torch.ones(V)}, "weight: got a torch.Tensor"),
    ({"return_predicted_tokens": True}, "return_predicted_tokens: got True"),
    ({"label_smoothing": 0.1, "softcap": 3.0}, "label_smoothing: got 0.1 with softcap 3.0"),
    ({"label_smoothing": 1.5}, "label_smoothing: got 1.5"),
    ({"reduction": "avg"}, "reduction: got 'avg'"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused(options, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        liger.LigerCrossEntropyLoss(**options)
    named = {("ce_weight" if name == "weight" else name): value for name, value in options.items()}
    with pytest.raises(ValueError, match=f"^{said.replace('weight', 'ce_weight')}"):
        liger.LigerFusedLinearCrossEntropyLoss(**named)
    with pytest.raises(ValueError, match=f"^{said}"):
        liger.liger_cross_entropy(torch.ones(1, V), torch.zeros(1, dtype=torch.int64), **options)


def test_refused_elsewhere():
    with pytest.raises(ValueError, match="^accum_dtype: got torch.bfloat16"):
        liger.LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.bfloat16)
    for name in ("size_average", "reduce"):
        with pytest.raises(ValueError, match=f"^{name}: got True"):
            liger.liger_cross_entropy(torch.ones(1, V), torch.zeros(1, dtype=torch.int64), **{name: True})
