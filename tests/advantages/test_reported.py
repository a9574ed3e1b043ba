"""Cases that users of other systems reported, in numbers by hand."""

import math

import pytest
import torch

from tokenrl import advantages as adv


def near(found, right, rtol=1e-5):
    right = torch.as_tensor(right, dtype=found.dtype).expand_as(found)
    torch.testing.assert_close(found, right, rtol=rtol, atol=rtol and 1e-6)


def test_a_truncated_response_is_bootstrapped_by_its_last_reward():
    """trl#1536: + gamma V_next on the last reward is delta = r + gamma V_next - V."""
    rewards, values = torch.tensor([[0.0, 0.5 * 0.75]]), torch.tensor([[0.5, 0.25]])
    advantages, returns = adv.gae(rewards, values, None, 0.5, 0.5, False)
    near(advantages, [[-0.34375, 0.125]])
    near(returns, [[0.15625, 0.375]])


def test_single_rollouts_have_their_rewards_whitened():
    """rllm#916: 0.8660, not 0."""
    found = adv.reinforce_plus_plus_baseline(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), torch.ones(2, 2).bool())
    near(found, [[0.75**0.5] * 2, [-(0.75**0.5)] * 2])


ONES, LENGTHS = torch.zeros(8, dtype=torch.int64), torch.arange(1, 9)
EQUAL = {
    "grpo": lambda x: adv.grpo(x, ONES),
    "none": lambda x: adv.grpo(x, ONES, scale="none"),
    "batch": lambda x: adv.grpo(x, ONES, scale="batch"),
    "rloo": lambda x: adv.rloo(x, ONES),
    "opo": lambda x: adv.opo(x, LENGTHS, ONES),
    "gpg": lambda x: adv.gpg(x, ONES),
    "pass_at_k": lambda x: adv.pass_at_k(x, ONES),
    "gdpo": lambda x: adv.gdpo(torch.stack([x, 2 * x], 1), ONES),
    "hapo": lambda x: adv.hapo(x, LENGTHS, ONES),
    "baseline": lambda x: adv.reinforce_plus_plus_baseline(x, ONES, torch.ones(8, 3).bool()),
}


@pytest.mark.parametrize("reward", [0.1, 0.35, 0.7, 1 / 3, 123.456])
@pytest.mark.parametrize("name", EQUAL)
def test_equal_rewards_that_no_float_holds_are_no_signal(name, reward):
    """verl#4597: exactly 0."""
    assert not EQUAL[name](torch.full((8,), reward)).any()


def test_one_of_eight():
    x = torch.tensor([0.35] * 7 + [0.0])
    near(adv.rloo(x, ONES), [0.05] * 7 + [-0.35])
    near(adv.grpo(x, ONES), [0.353550] * 7 + [-2.474854])


def test_whitening_of_few_tokens():
    """ROLL#475, AReaL#1347, slime#1369: a NaN in a masked cell, a scale without a shift, one valid token and none."""
    x, mask = torch.tensor([[1.0, math.nan], [3.0, 5.0]]), torch.tensor([[True, False], [True, True]])
    near(adv.whiten(x, mask), [[-1.0, 0.0], [0.0, 1.0]])
    near(adv.whiten(x, mask, mean=0.0, var=4.0), [[0.5, 0.0], [1.5, 2.5]])
    for few in (mask & (x == 1), torch.zeros_like(mask)):
        baseline = adv.reinforce_plus_plus_baseline(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), few)
        for found in (adv.whiten(x, few), adv.gae(x, x, few)[0], adv.reinforce_plus_plus(x, few), baseline):
            assert not found.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_rewards_that_would_round_are_refused(dtype):
    """OpenRLHF#1334: bf16 loses the baseline of (1, 1, 1, 1.0078125)."""
    x, ids = torch.tensor([1.0, 1.0, 1.0, 1.0078125]), ONES[:4]
    near(adv.grpo(x, ids, eps=0.0), [-0.5, -0.5, -0.5, 1.5])
    for call in (adv.grpo, adv.rloo, lambda x, g: adv.gdpo(x[:, None], g), lambda x, g: adv.opo(x, g + 1, g)):
        with pytest.raises(ValueError, match=r"^rewards: got dtype .*rewards.float\(\)"):
            call(x.to(dtype), ids)
