"""examples/preference.py: margins of the policy's own answers rise, by one head and by two."""

import copy
import importlib.util

import pytest
import torch
from paths import ROOT

from tokenrl.demo import model, task


@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_margins_rise_on_pairs_that_are_not_trained_on(name):
    """Of made-up answers: the right ones, and the same with every digit one further."""
    spec = importlib.util.spec_from_file_location("preference_example", ROOT / "examples" / "preference.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    policy = model.build(0, torch.device("cpu"))

    def pairs(first, count):
        terms = [(i % 5, i // 5 % 5, i // 25 % 5, 1) for i in range(first, first + count)]
        right = task.encode([task.solution(t) for t in terms], task.RESPONSE_LENGTH)
        wrong = torch.where(right < task.MODULUS, (right + 1) % task.MODULUS, right)
        ids, prompts = torch.cat([right, wrong]), task.encode([task.prompt(t) for t in terms] * 2, task.PROMPT_LENGTH)
        mask = ids != task.BLANK
        return example.Pairs(torch.cat([prompts, ids], 1), torch.where(mask, ids, -100), mask)

    trained, others = copy.deepcopy(policy), pairs(64, 24)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    example.prefer(trained, policy, pairs(0, 64), optimizer, name)
    with torch.no_grad():
        before, after = (example.loss_of(name, each, policy, others)[1] for each in (policy, trained))
    assert before.margins.abs().max() < 1e-5 and after.margins.mean() > 0.005 and after.accuracy > 0.6, after
