"""token_logprobs(inplace_backward=True): the same gradient in the memory of the logits, and no one is deceived."""

import pytest
import torch
from cases import device_of, kernel_backends
from logit_cases import DTYPES, make, on

import tokenrl
from tokenrl.logprobs.from_logits import OUTPUTS

KERNELS = kernel_backends()
EVERY_KERNEL = pytest.mark.parametrize("backend", KERNELS)


def start(backend, *shape, dtype=torch.float32, made=lambda leaf: leaf * 1, k=None):
    """(leaf, logits made from it, ids) on the backend's device."""
    logits, ids = make(*shape, dtype=dtype, k=k)
    leaf = logits.to(device_of(backend)).requires_grad_()
    return leaf, made(leaf), ids.to(leaf.device)


def loss_of(logits, ids, backend, inplace_backward=True, **options):
    stats = tokenrl.token_logprobs(
        logits, ids, outputs=OUTPUTS, backend=backend, inplace_backward=inplace_backward, **options
    )
    return stats.logp.sum() + 0.3 * stats.entropy.sum() - stats.lse.sum() + 2 * stats.log_sum_sq_probs.sum()


OPTIONS = {
    "plain": {},
    "temperatures": {"temperature": torch.tensor([0.5, 1.0, 2.0])},
    "softcap": {"softcap": 20.0, "logit_scale": 0.5},
    "keep": {"keep_mask": torch.arange(1201) % 5 != 1},
    "rows": {"row_mask": torch.tensor([True, False, True])},
}


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradient_is_the_same_and_lies_in_the_logits(options, dtype, backend):
    grads, k = [], 2
    for inplace_backward in (False, True):
        leaf, logits, ids = start(backend, 3, 1201, dtype=dtype, k=k)
        at = []
        logits.register_hook(lambda grad, at=at: at.append(grad.data_ptr()))
        chosen = on(leaf.device, OPTIONS[options])
        (grad,) = torch.autograd.grad(loss_of(logits, ids, backend, inplace_backward, **chosen), leaf)
        grads.append(grad)
        assert (at == [logits.data_ptr()]) == inplace_backward
    assert torch.equal(*grads) and torch.equal(logits.detach(), grads[1])


@EVERY_KERNEL
def test_few_rows_and_a_long_vocabulary(backend):
    grads = []
    for inplace_backward in (False, True):
        leaf, logits, ids = start(backend, 1, 70001, dtype=torch.bfloat16)
        grads += torch.autograd.grad(loss_of(logits, ids, backend, inplace_backward), leaf)
    assert torch.equal(*grads)


@EVERY_KERNEL
def test_a_view_is_written_where_it_lies(backend):
    """The rest of the tensor that the view is of keeps its values."""
    leaf, whole, ids = start(backend, 2, 4, 101)
    before = whole.detach().clone()
    view = whole[:, :-1, 3:90]
    ids = ids[:, :-1] % 87
    (grad,) = torch.autograd.grad(loss_of(view, ids, backend), leaf)
    inside = torch.zeros_like(before, dtype=torch.bool)
    inside[:, :-1, 3:90] = True
    assert torch.equal(whole.detach(), torch.where(inside, grad, before))
    (fresh,) = torch.autograd.grad(loss_of((leaf * 1)[:, :-1, 3:90], ids, backend, False), leaf)
    assert torch.equal(grad, fresh)


@EVERY_KERNEL
def test_a_second_backward_raises(backend):
    leaf, logits, ids = start(backend, 3, 65)
    loss = loss_of(logits, ids, backend)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


@EVERY_KERNEL
@pytest.mark.parametrize("consumer", ["square", "another call", "another call in place", "a view"])
def test_whoever_saved_the_logits_raises_afterwards(consumer, backend):
    leaf, logits, ids = start(backend, 3, 65)
    if consumer == "square":
        other = (logits * logits).sum()
    elif consumer == "a view":
        other = logits[:, 3:].square().sum()
    else:
        other = loss_of(logits, ids, backend, consumer == "another call in place")
    torch.autograd.grad(loss_of(logits, ids, backend), leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other, leaf)


@EVERY_KERNEL
def test_whoever_saved_the_logits_and_ran_before_is_right(backend):
    leaf, logits, ids = start(backend, 3, 65)
    loss = loss_of(logits, ids, backend)
    (grad,) = torch.autograd.grad(loss + (logits * logits).sum(), leaf)
    (alone,) = torch.autograd.grad(loss_of(leaf * 1, ids, backend, False), leaf)
    torch.testing.assert_close(grad, alone + 2 * leaf.detach())


@EVERY_KERNEL
def test_without_a_backward_nothing_is_written(backend):
    leaf, logits, ids = start(backend, 3, 65)
    before = logits.detach().clone()
    with torch.no_grad():
        loss_of(logits, ids, backend)
    loss_of(logits, ids, backend)
    loss_of(logits.detach(), ids, backend)
    assert torch.equal(logits.detach(), before)


REFUSED = {
    "a leaf": (lambda leaf: leaf, "leaf"),
    "a view of a leaf": (lambda leaf: leaf[:, :60], "leaf"),
    "expanded": (lambda leaf: (leaf[:1] * 1).expand(3, 65), "expanded"),
    "a last stride of 2": (lambda leaf: (leaf * 1)[:, ::2], "last stride"),
    "tanh": (torch.tanh, "Tanh"),
    "a view of tanh": (lambda leaf: torch.tanh(leaf)[:, :60], "Tanh"),
    "exp": (torch.exp, "Exp"),
    "sigmoid": (torch.sigmoid, "Sigmoid"),
    "softmax": (lambda leaf: leaf.softmax(-1), "Softmax"),
    "log_softmax": (lambda leaf: leaf.log_softmax(-1), "LogSoftmax"),
}


@EVERY_KERNEL
@pytest.mark.parametrize("refused", REFUSED)
def test_what_is_refused(refused, backend):
    """Where the gradient would destroy what autograd or the caller still needs."""
    made, reason = REFUSED[refused]
    _, logits, ids = start(backend, 3, 65, made=made)
    with pytest.raises(ValueError, match=f"^inplace_backward: got True, but .*{reason}.* accepted: False"):
        loss_of(logits, ids % 30, backend)


def test_the_reference_backend_refuses():
    _, logits, ids = start("reference", 3, 65)
    with pytest.raises(ValueError, match="^inplace_backward: got True, but the reference backend"):
        loss_of(logits, ids, "reference")


@EVERY_KERNEL
def test_a_traced_graph_refuses(backend):
    leaf, _, ids = start(backend, 3, 65)
    step = torch.compile(lambda x: loss_of(x * 1, ids, backend), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="inplace_backward"):
        step(leaf)
