"""The drop-ins of tokenrl.compat against TRL's own functions (skipped where trl is missing) and verl's formula."""

import inspect

import pytest
import torch
from cases import to_rounding
from torch.utils.checkpoint import checkpoint

from tokenrl import compat
from tokenrl.instruments.parity import close
from tokenrl.ops import backends

NATIVE = backends.choose(None, torch.device("cpu")).namespace is not None
NAMES = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
INPLACE = pytest.mark.skipif(not NATIVE, reason="the reference backend never writes in place")


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl.trainer.utils", reason="trl is not installed: nothing to compare with")


def make(*shape, dtype=torch.float64, k=None, vocab=37):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(*shape, vocab, generator=g, dtype=torch.float64)).to(dtype)
    index = torch.randint(0, vocab, shape if k is None else (*shape, k), generator=g)
    row_mask = (torch.rand(index.shape, generator=g) > 0.3).int()
    return logits, index, row_mask


def results(function, logits, *args, **more):
    """The outputs of a call, then the gradient of a weighted sum of them."""
    leaf = logits.clone().requires_grad_()
    out = function(leaf, *args, **more)
    out = out if isinstance(out, tuple) else (out,)
    weights = [torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype) for x in out]
    (grad,) = torch.autograd.grad(list(out), leaf, weights)
    return *(x.detach() for x in out), grad


def check(ours, theirs, logits, *args, **more):
    """The tolerance rule, with TRL in fp64 as the truth and TRL in the dtype of the logits as the base."""
    found = results(ours, logits, *args, **more)
    truth, base = (results(theirs, x, *args, **more) for x in (logits.double(), logits))
    for i, (a, t, b) in enumerate(zip(found, truth, base, strict=True)):
        close(a, t, b, what=f"{ours.__name__}, result {i}")
        if i < len(found) - 1:
            assert a.dtype == torch.promote_types(logits.dtype, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_trl(name, trl):
    assert inspect.signature(getattr(compat, name)) == inspect.signature(getattr(trl, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape,k", [((5,), None), ((3, 4), None), ((3, 4), 3), ((2, 3, 2), None), ((2, 3, 2), 2)])
def test_selective_log_softmax(shape, k, masked, dtype, trl):
    """Any leading dimensions, one id or K per row, masked entries zero."""
    logits, index, row_mask = make(*shape, dtype=dtype, k=k)
    more = {"row_mask": row_mask} if masked else {}
    check(compat.selective_log_softmax, trl.selective_log_softmax, logits, index, temperature=0.7, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)])
def test_entropy_from_logits(shape, dtype, trl):
    check(compat.entropy_from_logits, trl.entropy_from_logits, make(*shape, dtype=dtype)[0], chunk_size=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)])
def test_selective_log_softmax_and_entropy(shape, masked, dtype, trl):
    logits, index, row_mask = make(*shape, dtype=dtype)
    more = {"row_mask": row_mask if masked else None, "temperature": 1.3}
    name = "selective_log_softmax_and_entropy"
    check(getattr(compat, name), getattr(trl, name), logits, index, **more)


def test_an_entropy_without_gradient():
    logits, index, _ = make(3, 4)
    logits.requires_grad_()
    logp, entropy = compat.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)
    assert logp.requires_grad and not entropy.requires_grad
    assert torch.equal(entropy, compat.entropy_from_logits(logits))


def test_chunk_size_has_no_effect():
    logits = make(7)[0]
    assert torch.equal(compat.entropy_from_logits(logits, 1), compat.entropy_from_logits(logits, 128))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)])
def test_logprobs_from_logits(shape, inplace_backward, dtype):
    """logits at the label minus logsumexp, in the shape of the labels."""

    def formula(logits, labels):
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return x.gather(-1, labels[..., None]).squeeze(-1) - x.logsumexp(-1)

    def ours(logits, labels):
        return compat.logprobs_from_logits(logits * 1, labels, inplace_backward)

    logits, labels, _ = make(*shape, dtype=dtype)
    check(ours, formula, logits, labels)


class Saved(torch.autograd.Function):
    """Keeps its output as autograd sees it."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class Kept(Saved):
    """Keeps its output where autograd does not see it: a write there would give a wrong gradient in silence."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.saved = y.detach()
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 - ctx.saved * ctx.saved)


def tanh_of_a_slice(x):
    y = x * 1
    y[:, 1:7].tanh_()
    return y


MADE = {
    "an output": (lambda x: x * 1, True),
    "a view of an output": (lambda x: (x * 1)[:, 1:7], True),
    "a leaf": (lambda x: x, False),
    "a view of a leaf": (lambda x: x[:, 1:7], False),
    "expanded": (lambda x: (x[:1] * 1).expand(3, 8), False),
    "a last stride of 2": (lambda x: (x * 1)[:, ::2], False),
    "tanh": (lambda x: x.tanh(), False),
    "softmax": (lambda x: x.softmax(-1), False),
    "a view of exp": (lambda x: x.exp()[:, 1:7], False),
    "a head": (lambda x: torch.nn.functional.linear(x[None], torch.eye(8, dtype=x.dtype))[0], True),
    "a compiled graph": (lambda x: torch.compile(torch.tanh, backend="aot_eager")(x), False),
    "a Function that saves its output": (lambda x: Saved.apply(x), False),
    "a Function that keeps its output": (lambda x: Kept.apply(x), False),
    "a write through a view": (tanh_of_a_slice, False),
}


@INPLACE
@pytest.mark.parametrize("made", MADE)
def test_the_rule_for_a_gradient_in_place(made):
    """The gradient is right everywhere, and lies in the logits' memory exactly where the docstring says so."""
    build, in_place = MADE[made]
    labels = torch.tensor([0, 3, 1])
    grads = []
    for permitted in (False, True):
        leaf = torch.linspace(-2, 2, 24).view(3, 8).requires_grad_()
        logits = build(leaf)
        before = logits.detach().clone()
        (grad,) = torch.autograd.grad(compat.logprobs_from_logits(logits, labels, permitted).sum(), leaf)
        grads.append(grad)
        assert torch.equal(logits.detach(), before) != (permitted and in_place)
    if made in ("softmax", "expanded", "a head"):  # from there on the backward is torch's, which promises no bits
        to_rounding(*grads)
    else:
        assert torch.equal(*grads)


@INPLACE
@pytest.mark.parametrize("made", ["a head", "tanh"])
def test_a_checkpointed_head_runs_as_often_as_in_eager_torch(made):
    labels, found = torch.tensor([0, 3, 1]), []

    def eager(logits, labels):
        return logits.log_softmax(-1).gather(1, labels[:, None])

    for function in (eager, compat.logprobs_from_logits):
        runs, leaf = [], torch.linspace(-2, 2, 24, dtype=torch.float64).view(3, 8).requires_grad_()
        logits = checkpoint(lambda x, runs=runs: runs.append(1) or MADE[made][0](x * 1), leaf, use_reentrant=False)
        (grad,) = torch.autograd.grad(function(logits, labels).sum(), leaf)
        found.append((len(runs), grad))
    assert found[0][0] == found[1][0] == 2
    to_rounding(found[1][1], found[0][1])


@INPLACE
def test_the_rule_names_the_reference_backend(monkeypatch):
    monkeypatch.setenv("TOKENRL_BACKEND", "reference")
    leaf = torch.linspace(-2, 2, 24).view(3, 8).requires_grad_()
    logits = leaf * 1
    before = logits.detach().clone()
    compat.logprobs_from_logits(logits, torch.tensor([0, 3, 1])).sum().backward()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("name", ["index", "row_mask"])
def test_wrong_shapes_are_named(name):
    logits, index, row_mask = make(2, 3, 2)
    given = {"index": index, "row_mask": row_mask} | {name: index[:1]}
    if name == "index":
        given["row_mask"] = None
    with pytest.raises(ValueError, match=rf"^{name}: got shape \[1, 3, 2\], accepted: .*\[2, 3, 2\]"):
        compat.selective_log_softmax(logits, **given)
