"""Masks of the rollout correction against verl's outputs (tests/golden) and their formulas in loops."""

import itertools
import math

import pytest
import torch
from golden_data import INDEX, arrays, near
from rollout_cases import FAMILY, VALID, batch, golden_range, loop_spans

from tokenrl import corrections as cor


def ratio(trained, sampled):
    return min(max(trained - sampled, -20.0), 20.0)


def taken(logp):
    return min(max(math.exp(logp), 1e-6), 1 - 1e-6)


def binary_kl(trained, sampled):
    return sum(mu * math.log(mu / p) for mu, p in ((taken(sampled), taken(trained)),
                                                   (1 - taken(sampled), 1 - taken(trained))))  # fmt: skip


TERMS = {
    "k1": lambda *of: -ratio(*of),
    "k2": lambda *of: ratio(*of) ** 2 / 2,
    "k3": lambda *of: math.exp(ratio(*of)) - 1 - ratio(*of),
    "tv": lambda trained, sampled: abs(taken(trained) - taken(sampled)),
    "binary_kl": binary_kl,
}


def loop_rejection(logp, rollout, statistic, low, high):
    take = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max}
    name = next(name for name in TERMS if statistic.endswith(name))
    level = statistic.removesuffix(name).strip("_").split("_")
    out = torch.zeros(VALID.shape, dtype=torch.bool)
    for row, there in loop_spans("token" if level == ["token"] else "sequence"):
        terms = [TERMS[name](float(logp[row, t]), float(rollout[row, t])) for t in there]
        found = take[level[1] if len(level) > 1 else "sum"](terms)
        kept = (low or 0) <= math.exp(found) <= high if name == "k1" else found <= high
        for t in there:
            out[row, t] = kept
    return out


@pytest.mark.parametrize("case", [f"reject.{i}" for i in range(8)])
def test_golden_rejection(case):
    x, config = arrays(FAMILY, case), INDEX[FAMILY]["cases"][case]["config"]
    kept = x["mask"]
    criteria = config["rollout_rs"].split(","), config["rollout_rs_threshold"].split(",")
    for statistic, threshold in zip(*criteria, strict=True):
        low, high = golden_range(threshold)
        kept = kept & cor.rejection_mask(
            x["old_logp"], x["rollout_logp"], statistic=statistic, low=low, high=high, mask=x["mask"]
        )
    assert torch.equal(kept, x["keep_mask"]), case
    assert kept.any() and (x["mask"] & ~kept).any(), "a case that keeps or drops all tests nothing"


@pytest.mark.parametrize("statistic", cor.REJECTIONS)
def test_rejection_is_its_formula(statistic):
    seen = set()
    for seed, high, scale in itertools.product(range(4), (0.2, 0.8, 1.3), (0.6, 30.0)):
        logp, rollout = batch(seed, scale)
        low = 0.4 * high if statistic.endswith("k1") else None
        kept = cor.rejection_mask(logp, rollout, statistic=statistic, low=low, high=high, mask=VALID)
        assert torch.equal(kept, loop_rejection(logp, rollout, statistic, low, high))
        seen |= set(kept[VALID].tolist())
    assert seen == {False, True}


def test_both_ends_are_kept_and_k1_is_the_inverse_ratio():
    logp = torch.tensor([[0.0, 0.5, -0.5]], dtype=torch.float64)
    half = cor.rejection_mask(logp, torch.zeros_like(logp), statistic="token_k1", low=math.exp(-0.5), high=1.0)
    assert half.tolist() == [[True, True, False]], "rollout / train is 1, e^-0.5, e^0.5"
    equal = cor.rejection_mask(logp, torch.zeros_like(logp), statistic="token_k2", high=0.125)
    assert equal.all()
    weights = cor.importance_weights(logp, torch.zeros_like(logp), bound="mask", low=1.0, high=math.exp(0.5))
    assert (weights > 0).tolist() == [[True, True, False]]


def test_one_end_may_be_open():
    logp, rollout = batch()
    for low, high in ((None, 1.1), (0.9, None), (0.0, 1.1)):
        kept = cor.rejection_mask(logp, rollout, statistic="seq_mean_k1", low=low, high=high, mask=VALID)
        assert torch.equal(kept, loop_rejection(logp, rollout, "seq_mean_k1", low, math.inf if high is None else high))


def test_seq_mask_tis_is_two_calls():
    logp, rollout = batch()
    low, high = 0.9, 1.2
    inside = cor.rejection_mask(logp, rollout, statistic="seq_mean_k1", low=1 / high, high=1 / low, mask=VALID)
    found = cor.importance_weights(logp, rollout, mask=VALID, bound="none") * inside
    expected, kept = torch.zeros_like(found), []
    for row, there in loop_spans("sequence"):
        q = [float(logp[row, t] - rollout[row, t]) for t in there]
        kept.append(low <= math.exp(sum(q) / len(q)) <= high)
        for t, x in zip(there, q, strict=True):
            expected[row, t] = math.exp(x) * kept[-1]
    near(found, expected, "seq-mask-tis")
    assert set(kept) == {False, True}


def test_off_policy_rows_are_their_formula():
    logp, rollout = batch()
    seen = set()
    for signs, threshold in itertools.product(itertools.product((-1.0, 0.0, 1.0), repeat=4), (-0.3, 0.0, 0.2)):
        advantages = torch.tensor(signs, dtype=torch.float64)
        expected = VALID.clone()
        for row, there in loop_spans("sequence"):
            mean = sum(float(rollout[row, t] - logp[row, t]) for t in there) / len(there)
            if signs[row] < 0 and mean > threshold:
                expected[row] = False
        kept = cor.off_policy_sequence_mask(logp, rollout, advantages, threshold=threshold, mask=VALID)
        assert torch.equal(kept, expected)
        per_token = torch.where(VALID, advantages[:, None], math.nan)
        again = cor.off_policy_sequence_mask(logp, rollout, per_token, threshold=threshold, mask=VALID)
        assert torch.equal(again, expected)
        seen |= set(kept[VALID].tolist())
    assert seen == {False, True}


def test_per_token_advantages_drop_their_own_tokens():
    logp, rollout = torch.full((1, 3), -1.0), torch.zeros(1, 3)
    advantages = torch.tensor([[1.0, -1.0, 0.0]])
    kept = cor.off_policy_sequence_mask(logp, rollout, advantages, threshold=0.5)
    assert kept.tolist() == [[True, False, True]]
