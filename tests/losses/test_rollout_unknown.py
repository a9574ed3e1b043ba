"""Tokens that the engine did not score, NaN in rollout_logp: an error that names it, or a ratio of 1."""

import math

import pytest
import torch
from cases import backends_to_test, device_of, to_rounding

import tokenrl
from tokenrl import corrections as cor

LOGP, OLD = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.1, -1.9, -3.0]])
ROLLOUT = torch.tensor([[-1.0, math.nan, -3.0]])
KNOWN = torch.where(ROLLOUT.isnan(), OLD, ROLLOUT)
NEUTRAL = {"bound": "truncate", "high": 2.0, "unknown": "neutral"}
CALLS = {
    **{
        level: lambda rollout, level=level, **more: cor.importance_weights(
            OLD, rollout, level=level, high=2.0, segment_ids=OLD.long() * 0 if level == "segment" else None, **more
        )
        for level in cor.LEVELS
    },
    **{
        name: lambda rollout, name=name, **more: cor.rejection_mask(OLD, rollout, statistic=name, high=1.0, **more)
        for name in ("token_k1", "seq_sum_k2", "seq_mean_k3", "seq_max_k3")
    },
    "opsm": lambda rollout, **more: cor.off_policy_sequence_mask(OLD, rollout, -torch.ones(1), threshold=0.5, **more),
}


@pytest.mark.parametrize("name", CALLS)
def test_unknown_tokens_raise_or_have_a_ratio_of_one(name):
    """Masked cells are nobody's tokens."""
    call, mask = CALLS[name], ROLLOUT == ROLLOUT
    with pytest.raises(ValueError, match="^rollout_logp: got NaN for 1 tokens, accepted: .*unknown='neutral'"):
        call(ROLLOUT)
    assert torch.equal(call(ROLLOUT, mask=mask), call(KNOWN, mask=mask))
    assert torch.equal(call(ROLLOUT, unknown="neutral"), call(KNOWN))
    with pytest.raises(ValueError, match="^unknown: got 'zero', accepted: raise, neutral"):
        call(ROLLOUT, unknown="zero")


@pytest.mark.parametrize("backend", backends_to_test())
def test_the_loss_of_an_unknown_token_has_weight_one(backend):
    """Weights e^-0.1, 1, 1."""
    device, weights = device_of(backend), torch.tensor([[math.exp(-0.1), 1.0, 1.0]])
    found = []
    for more in ({"token_weight": weights}, {"rollout_logp": ROLLOUT, "correction": NEUTRAL}):
        given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
        leaf, ones = LOGP.to(device).requires_grad_(), torch.ones(1, device=device)
        loss, _ = tokenrl.policy_loss("dapo", leaf, OLD.to(device), ones, backend=backend, **given)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for one, other in zip(*found, strict=True):
        to_rounding(one, other)


def test_the_losses_name_the_argument():
    hidden, weight, ids = torch.ones(1, 3, 4), torch.ones(5, 4), torch.zeros(1, 3, dtype=torch.int64)
    for call in (
        lambda: tokenrl.policy_loss("dapo", LOGP, OLD, torch.ones(1), rollout_logp=ROLLOUT),
        lambda: tokenrl.linear_policy_loss("dapo", hidden, weight, ids, OLD, torch.ones(1), rollout_logp=ROLLOUT),
    ):
        with pytest.raises(ValueError, match="^rollout_logp: got NaN for 1 tokens"):
            call()


def test_where_a_look_were_a_sync_nan_stays(monkeypatch):
    monkeypatch.setattr("tokenrl.losses.rollout_correction.values_known", lambda x: False)
    assert CALLS["token"](ROLLOUT).isnan().tolist() == [[False, True, False]]
    assert cor.rejection_mask(OLD, ROLLOUT, statistic="token_k2", high=1.0).tolist() == [[True, False, True]]
