"""What torch makes a tensor of where nobody says it, device and dtype, changes no result."""

import pytest
import torch
from front_calls import CALLS, GROUPS, LOGP, OLD, R, tensors

import tokenrl


@pytest.fixture(params=["meta", torch.bfloat16], ids=str)
def default(request):
    """Sets it when called."""
    dtype = torch.get_default_dtype()
    yield lambda: (torch.set_default_device if request.param == "meta" else torch.set_default_dtype)(request.param)
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


def same(call, default):
    plain = tensors(call())
    default()
    for a, b in zip(plain, tensors(call()), strict=True):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("function,given", CALLS, ids=lambda x: getattr(x, "__name__", ""))
def test_no_function_follows_it(function, given, backend, default, monkeypatch):
    monkeypatch.setenv("TOKENRL_BACKEND", backend)
    same(lambda: function(**given), default)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", tokenrl.OBJECTIVES)
def test_no_objective_follows_it(name, backend, default):
    def call():
        torch.manual_seed(0)
        leaf = LOGP.clone().requires_grad_()
        loss, metrics = tokenrl.policy_loss(name, leaf, OLD, R, group_ids=GROUPS, backend=backend)
        return loss.detach(), metrics.raw, *torch.autograd.grad(loss, leaf)

    same(call, default)
