"""Rows of preference_loss without a trainer's function to call, typed from their formulas; value and gradient."""

import pytest
import torch
from preference_cases import P, batch
from torch.nn.functional import logsigmoid

import tokenrl


def alike(case, formula, **given):
    """formula: of the sums of log ratios, the lengths, both [2 P]."""
    logp, mask = case["logp"].requires_grad_(), case["mask"]
    ours, metrics = tokenrl.preference_loss(**case, **given)
    theirs = formula(torch.where(mask, logp - case["ref_logp"], 0).sum(1), mask.sum(1))
    torch.testing.assert_close(ours, theirs)
    for found, expected in zip(*(torch.autograd.grad(loss, logp) for loss in (ours, theirs)), strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected)
    return metrics


def test_r_dpo_wants_a_longer_answer_to_win_by_less():
    alpha, beta = 0.03, 0.2

    def formula(x, length):
        margin = beta * (x[:P] - x[P:]) + alpha * (length[:P] - length[P:])
        return -logsigmoid(margin).mean()

    metrics = alike(batch("r_dpo"), formula, objective=tokenrl.preference("r_dpo", beta=beta, length=alpha))
    plain = tokenrl.preference_loss(tokenrl.preference("dpo", beta=beta), **batch("dpo"))[1]
    torch.testing.assert_close(metrics.margins, plain.margins)  # rewards are of the log ratios alone


@pytest.mark.parametrize("shift", [None, 0.3, torch.tensor([0.1, -0.4])], ids=["batch", "number", "rewards"])
def test_bco_unpaired(shift):
    """With weights by density ratio, of undesirable sequences; the shift None is the batch's mean reward."""
    case, beta = batch("bco_unpaired"), 0.2
    del case["reward_shift"]
    desirable, weight = case["desirable"], torch.tensor([1.0, 0.4, 1.0, 1.0, 2.0, 0.7], dtype=torch.float64)

    def formula(x, _):
        rewards = beta * x
        delta = rewards.detach().mean() if shift is None else torch.as_tensor(shift, dtype=torch.float64).mean()
        losses = torch.where(desirable, -logsigmoid(rewards - delta), -logsigmoid(delta - rewards))
        return (weight * losses).mean()

    row = tokenrl.preference("bco_unpaired", beta=beta)
    alike(case, formula, objective=row, reward_shift=shift, pair_weight=weight)
