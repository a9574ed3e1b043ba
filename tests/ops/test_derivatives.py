"""However a call is differentiated, eagerly, in a trace or under torch.func, the derivative is the same."""

import weakref

import pytest
import torch
from torch.autograd import forward_ad

import tokenrl

IDS = torch.tensor([[0, 3, 1], [2, 2, 4]])


def policy(logp):
    return tokenrl.policy_loss("ctpo", logp, torch.full((2, 3), -1.1), torch.tensor([1.0, -2.0]))[0]


def logprobs(logits):
    stats = tokenrl.token_logprobs(logits, IDS, temperature=0.7)
    return (stats.logp - 0.1 * stats.entropy).sum()


def from_hidden(hidden):
    weight = torch.linspace(-1, 1, 20).view(5, 4)
    return tokenrl.linear_policy_loss("gspo", hidden, weight, IDS, torch.full((2, 3), -1.7), torch.ones(2))[0]


def divergence(logits):
    other = torch.linspace(-1, 1, 30).view(2, 3, 5)
    to, fro = (tokenrl.token_divergence(*pair, "jsd") for pair in ((logits, other), (other.flip(0), logits)))
    return (to - 0.3 * fro).sum()


def divergence_from_hidden(hidden):
    weight, other = torch.linspace(-1, 1, 20).view(5, 4), torch.linspace(-2, 3, 24).view(2, 3, 4)
    return tokenrl.linear_token_divergence(hidden, weight, other, weight.flip(0), "reverse_kl").square().sum()


def distilled(hidden):
    weight, other = torch.linspace(-1, 1, 20).view(5, 4), torch.linspace(-2, 3, 24).view(2, 3, 4)
    return tokenrl.linear_distillation_loss("gkd", hidden, weight, other, weight.flip(0))[0]


CASES = {
    policy: (2, 3), logprobs: (2, 3, 5), from_hidden: (2, 3, 4), divergence: (2, 3, 5),
    divergence_from_hidden: (2, 3, 4), distilled: (2, 3, 4),
}  # fmt: skip


def gradient(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


@pytest.mark.parametrize("function", CASES)
def test_every_way_to_differentiate_gives_one_gradient(function):
    x = torch.randn(*CASES[function], generator=torch.Generator().manual_seed(0)) - 1
    eager = gradient(function, x)
    assert eager.abs().max() > 0
    traced = gradient(torch.compile(function, fullgraph=True, backend="aot_eager"), x)
    for other in (traced, torch.func.grad(function)(x)):
        torch.testing.assert_close(other, eager, rtol=0, atol=0)


@pytest.mark.parametrize("function", CASES)
def test_without_a_gradient_nothing_is_recorded(function):
    x = torch.zeros(*CASES[function])
    assert not function(x).requires_grad
    with torch.no_grad():
        assert not function(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("function", CASES)
def test_a_second_derivative_raises_and_is_never_zero_in_silence(function):
    x = torch.randn(*CASES[function], generator=torch.Generator().manual_seed(0)) - 1
    leaf = x.clone().requires_grad_()
    loss = function(leaf)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice, accepted: once"):
        (loss + grad.square().sum()).backward()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.functional.hessian(function, x)
    with pytest.raises(RuntimeError, match="two levels of torch.func.grad|forward-mode AD"):
        torch.func.hessian(function)(x)
    with pytest.raises(RuntimeError, match="two levels of torch.func.grad"):
        torch.func.grad(lambda y: torch.func.grad(function)(y).sum())(x)


@pytest.mark.parametrize("function", CASES)
def test_forward_mode_raises_and_is_never_zero_in_silence(function):
    x = torch.zeros(*CASES[function])
    with pytest.raises(RuntimeError, match="forward-mode AD, accepted: reverse mode"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode AD"):
        function(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("name", ["gmpo", "fipo", "hmpo", "fiberpo", "cppo"])
def test_forms_have_one_gradient_however_they_are_differentiated(name):
    def loss(logp):
        return tokenrl.policy_loss(name, logp, torch.full((2, 3), -1.1), torch.tensor([1.0, -2.0]))[0]

    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)) - 1
    torch.testing.assert_close(torch.func.grad(loss)(x), gradient(loss, x), rtol=0, atol=0)


def test_what_autograd_saves_can_be_moved_away_meanwhile():
    """Checkpoints and offloading replace what is saved: nothing beside it may keep logits or hidden states alive."""
    for function, shape in CASES.items():
        leaf = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        given = leaf * 1
        gone = weakref.ref(given)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
            loss = function(given)
        del given
        assert gone() is None, function.__name__
        loss.backward()
        torch.testing.assert_close(leaf.grad, gradient(function, leaf.detach()), rtol=0, atol=0)
