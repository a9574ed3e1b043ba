"""Advantages from other baselines than the group's mean, typed out in loops."""

import math

import pytest
import torch
from advantage_cases import IDS, REWARDS, members, of, same

from tokenrl import advantages as adv

GROUPS = torch.tensor(IDS)
MEANS = [math.fsum(REWARDS[j] for j in members(i)) / len(members(i)) for i in range(len(IDS))]
ALONE = [len(members(i)) == 1 for i in range(len(IDS))]


def test_maxrl():
    assert min(MEANS) > 0
    expected = [(r - m) / m for r, m in zip(REWARDS, MEANS, strict=True)]
    same(adv.maxrl(of(REWARDS), GROUPS), expected)
    raw = [r if alone else (r - m) / (m + 1e-6) for r, m, alone in zip(REWARDS, MEANS, ALONE, strict=True)]
    same(adv.maxrl(of(REWARDS), GROUPS, eps=1e-6, singleton="raw"), raw)
    failed = adv.maxrl(of([0.0, 0.0, -1.0, 0.5, 1.0]), torch.tensor([0, 0, 1, 1, 2]))
    assert failed.tolist() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("tau", [0.3, 1.0, 1e-3])
def test_soft_value_and_opmd(tau):
    values = []
    for i in range(len(IDS)):
        rewards = [REWARDS[j] for j in members(i)]
        values.append(max(rewards) + tau * math.log(sum(math.exp((r - max(rewards)) / tau) for r in rewards)))
        values[-1] -= tau * math.log(len(rewards))
    same(adv.soft_value(of(REWARDS), GROUPS, tau=tau), values)
    soft = [r - (0 if alone else v) for r, v, alone in zip(REWARDS, values, ALONE, strict=True)]
    same(adv.opmd(of(REWARDS), GROUPS, baseline="soft", tau=tau), soft)
    mean = [r - (0 if alone else m) for r, m, alone in zip(REWARDS, MEANS, ALONE, strict=True)]
    same(adv.opmd(of(REWARDS), GROUPS), mean)


def test_asymre():
    expected = [r - (0 if alone else m - 0.1) for r, m, alone in zip(REWARDS, MEANS, ALONE, strict=True)]
    same(adv.asymre(of(REWARDS), GROUPS), expected)


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.95, 1.0])
def test_rae(decay):
    agents, state = [2, 0, 2, 2, 0, 3, 2, 0, 2, 2, 3, 2], [0.25, -1.0, 0.5, 0.0]
    expected, after = [], list(state)
    for r, agent in zip(REWARDS, agents, strict=True):
        expected.append(r - after[agent])
        after[agent] = decay * after[agent] + (1 - decay) * r
    found, baselines = adv.rae(of(REWARDS), torch.tensor(agents), of(state), decay=decay)
    same(found, expected)
    same(baselines, after)
    first, between = adv.rae(of(REWARDS[:5]), torch.tensor(agents[:5]), of(state), decay=decay)
    rest, last = adv.rae(of(REWARDS[5:]), torch.tensor(agents[5:]), between, decay=decay)
    same(torch.cat([first, rest]), expected)
    same(last, after)


def test_no_sequence_and_fp32():
    none = torch.zeros(0)
    for call in (adv.maxrl, adv.soft_value, adv.opmd, adv.asymre):
        assert call(none, none.long()).shape == (0,)
        assert call(of(REWARDS).float(), GROUPS).dtype == torch.float32
    found, state = adv.rae(none, none.long(), of([0.5, 1.5]))
    assert found.shape == (0,) and state.tolist() == [0.5, 1.5]
