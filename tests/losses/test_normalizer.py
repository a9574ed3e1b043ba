"""A normalizer that is zero, broken or negative: 0 / 0 of a batch without tokens is 0, all else shows."""

import math

import pytest
import torch
from cases import backends_to_test, device_of

import tokenrl

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # the interpreter's, of numpy
EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
EMPTY = torch.zeros(2, 3, dtype=torch.bool)
GROUPS, ADVANTAGES = torch.tensor([0, 0]), torch.tensor([1.0, -1.0])


def policy(name):
    def loss(leaf, mask, normalizer, backend):
        more = {"group_ids": GROUPS.to(leaf.device), "mask": mask, "normalizer": normalizer, "backend": backend}
        return tokenrl.policy_loss(name, leaf, None, ADVANTAGES.to(leaf.device), **more)[0]

    return loss


def aggregate(leaf, mask, normalizer, backend):
    return tokenrl.group_aggregate(leaf, "token-mean", mask=mask, normalizer=normalizer, backend=backend)


def weights(leaf, mask, normalizer, backend):
    w = tokenrl.aggregation_weights("token-mean", mask=mask, normalizer=normalizer, backend=backend)
    return (torch.where(mask, leaf, 0) * w).sum()


def linear(leaf, mask, normalizer, backend):
    hidden, ids = leaf[..., None].expand(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64, device=leaf.device)
    weight, more = torch.eye(4, device=leaf.device), {"mask": mask, "normalizer": normalizer, "backend": backend}
    return tokenrl.linear_policy_loss("dapo", hidden, weight, ids, None, ADVANTAGES.to(leaf.device), **more)[0]


CALLS = {"dapo": policy("dapo"), "real": policy("real"), "aggregate": aggregate, "weights": weights, "linear": linear}


@EVERY_BACKEND
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.tensor(0.0, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_zero_of_no_token_is_a_loss_of_zero(call, zero, backend):
    leaf = torch.full((2, 3), math.nan, device=device_of(backend), requires_grad=True)
    loss = CALLS[call](leaf, EMPTY.to(leaf.device), zero, backend)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss == 0 and not grad.any()


BROKEN = [math.nan, -1.0, 0]


@EVERY_BACKEND
@pytest.mark.parametrize("broken", [*BROKEN, *map(torch.tensor, BROKEN)], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_a_broken_count_is_an_error_that_names_it(call, broken, backend):
    if device_of(backend).type != "cpu":
        pytest.skip("a check of a value were a sync")
    with pytest.raises(ValueError, match="^normalizer: got .*, accepted: a positive number"):
        CALLS[call](torch.ones(2, 3), ~EMPTY, broken, backend)


@EVERY_BACKEND
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("call", ["dapo", "aggregate", "real"])
def test_a_broken_count_that_nobody_may_look_at_shows_in_the_loss(call, broken, backend, monkeypatch):
    """As on a GPU, where a look at it were a sync."""
    monkeypatch.setattr("tokenrl.losses.aggregation.values_known", lambda x: False)
    leaf = torch.ones(2, 3, device=device_of(backend), requires_grad=True)
    loss = CALLS[call](leaf, ~EMPTY.to(leaf.device), torch.tensor(broken, device=leaf.device), backend)
    assert not loss.isfinite() and not torch.autograd.grad(loss, leaf)[0].isfinite().all()
