"""However a call is differentiated, eagerly, in a trace or under torch.func, the derivative is the same."""

import pytest
import torch

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


CASES = {policy: (2, 3), logprobs: (2, 3, 5), from_hidden: (2, 3, 4)}


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
