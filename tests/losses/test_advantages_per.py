"""A packed batch of as many sequences as tokens, where the shape of advantages does not say which they are of."""

import pytest
import torch
from cases import backends_to_test, device_of, to_rounding

import tokenrl
from tokenrl import corrections, hidden_reward, selection

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
CU = torch.tensor([0, 2, 2, 3, 4])  # lengths 2, 0, 1, 1
OWNER = torch.tensor([0, 0, 2, 3])
LOGP, OLD = torch.tensor([-1.0, -2.0, -3.0, -0.5]), torch.tensor([-1.1, -2.3, -2.8, -0.6])
A, GROUPS = torch.tensor([1.0, 7.0, -2.0, 0.5]), torch.tensor([0, 0, 0, 1])


def called(name, advantages, per, backend, **more):
    device = device_of(backend)
    leaf = LOGP.to(device, copy=True).requires_grad_()
    given = {"cu_seqlens": CU.to(device), "group_ids": GROUPS.to(device), "backend": backend} | more
    loss, _ = tokenrl.policy_loss(name, leaf, OLD.to(device), advantages.to(device), advantages_per=per, **given)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        to_rounding(one, other)


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["grpo", "ba", "gmpo"])
def test_of_sequences_they_are_spread_over_their_tokens(name, backend):
    same(called(name, A, "sequence", backend), called(name, A[OWNER], "token", backend))
    same(called(name, A, None, backend), called(name, A, "token", backend))
    assert called(name, A, "sequence", backend)[0] != called(name, A, "token", backend)[0]


@EVERY_BACKEND
def test_real_takes_those_of_sequences(backend):
    """Two of one group: log(1 + e^(-2 s)) of the rewarded row, log(1 + e^(2 s)) of the other."""
    found = called("real", A, "sequence", backend)
    s = (LOGP - OLD)[:2].mean(), (LOGP - OLD)[2]
    right = torch.log1p((-2 * s[0]).exp()) + torch.log1p((2 * s[1]).exp())
    to_rounding(found[0].cpu(), right / 2)
    same(called("real", A, None, backend), found)
    with pytest.raises(ValueError, match="advantages: got one per token, accepted: one per sequence"):
        called("real", A, "token", backend)


def test_from_hidden_states():
    hidden, weight, ids = torch.ones(4, 3), torch.eye(5, 3), torch.tensor([0, 1, 2, 3])

    def loss(advantages, per):
        more = {"cu_seqlens": CU, "advantages_per": per}
        return tokenrl.linear_policy_loss("grpo", hidden, weight, ids, OLD, advantages, **more)[0]

    assert torch.equal(loss(A, "sequence"), loss(A[OWNER], "token")) and loss(A, "sequence") != loss(A, "token")


SHARED = {"cu_seqlens": CU}
OTHERS = {
    "weights": lambda a, per: tokenrl.aggregation_weights(
        "balanced", advantages=a, advantages_per=per, group_ids=GROUPS, **SHARED
    ),
    "aggregate": lambda a, per: tokenrl.group_aggregate(
        LOGP, "balanced", advantages=a, advantages_per=per, group_ids=GROUPS, **SHARED
    ),
    "opsm": lambda a, per: corrections.off_policy_sequence_mask(
        LOGP, LOGP + 1, a, advantages_per=per, threshold=0.1, **SHARED
    ),
    "threshold": lambda a, per: selection.advantage_entropy_threshold(a, -LOGP, 0.6, advantages_per=per, **SHARED),
    "mask": lambda a, per: selection.advantage_entropy_mask(a, -LOGP, 0.6, advantages_per=per, **SHARED),
    "thr": lambda a, per: hidden_reward.thr_advantages(LOGP, a, p=0.1, tau=0.0, advantages_per=per, **SHARED),
    "nthr": lambda a, per: hidden_reward.nthr_advantages(
        LOGP, a, A > 0, tau=-9.0, eta=0.5, advantages_per=per, **SHARED
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_wherever_they_may_be_either(name):
    call = OTHERS[name]
    assert torch.equal(call(A, "sequence"), call(A[OWNER], "token"))
    assert torch.equal(call(A, None), call(A, "token"))


@pytest.mark.parametrize("name", OTHERS)
def test_errors_name_the_arguments(name):
    for a, per, message in (
        (A, "row", "advantages_per: got 'row', accepted: sequence, token"),
        (A[:3], "token", r"advantages: got shape \[3\], accepted: one per token, \[4\]"),
        (A[:3], "sequence", r"advantages: got shape \[3\], accepted: one per sequence, \[4\]"),
        (A[:3], None, r"advantages: got shape \[3\], accepted: one per sequence, \[4\], or per token, \[4\]"),
    ):
        with pytest.raises(ValueError, match="^" + message):
            OTHERS[name](a, per)
