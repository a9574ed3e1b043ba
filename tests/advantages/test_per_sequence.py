"""Advantage estimators against verl's outputs (tests/golden), against their formulas in loops, and their edges."""

import math
import statistics

import pytest
import torch
from advantage_cases import IDS, LENGTHS, REWARDS, members, of, same
from golden_data import INDEX, arrays, near

from tokenrl import advantages as adv

FAMILY = "verl_advantages"
# verl adds 1e-8 to the number of tokens that it whitens over, and computes some estimators in fp32. The tolerance is
# absolute too: the mean is off, and whitened values are of order one.
LOOSE = {
    "gae": 1e-8, "reinforce_plus_plus": 1e-8, "reinforce_plus_plus_baseline": 1e-8, "gdpo": 1e-5,
    "grpo_vectorized": 1e-5,
}  # fmt: skip


def sequence_scores(x):
    return x["rewards"].sum(1)


def scale_of(config):
    return "std" if config["norm_adv_by_std_in_grpo"] else "none"


def token_baseline(x, config, position):
    names = ("rewards", "group_id", "old_logp", "sum_pi_squared", "mask")
    more = {"is_weights": x.get("is_weights"), "zero_tail": config["handle_zero_tail"], "position": position}
    return adv.otb(*(x[name] for name in names), **more)


def per_group(f):
    return lambda x, config: f(sequence_scores(x), x["group_id"])


# Each takes the arrays and the config of a case; [S] is compared on the valid tokens of a sequence.
OURS = {
    "gae": lambda x, c: adv.gae(x["rewards"], x["values"], x["mask"], c["gamma"], c["lam"]),
    "gdpo": lambda x, c: adv.gdpo(
        torch.stack([x["rewards_a"], x["rewards_b"]], 1), x["group_id"], lengths=x["mask"].sum(1),
        weights=torch.tensor(c["reward_weights"]),
    ),
    "gpg": lambda x, c: adv.gpg(sequence_scores(x), x["group_id"], f_norm=c["f_norm"]),
    "grpo": lambda x, c: adv.grpo(sequence_scores(x), x["group_id"], scale=scale_of(c)),
    "grpo_vectorized": lambda x, c: adv.grpo(sequence_scores(x), x["group_id"], scale=scale_of(c)),
    "grpo_passk": lambda x, c: adv.pass_at_k(sequence_scores(x), x["group_id"], scale=scale_of(c)),
    "multi_turn_optimal_token_baseline": lambda x, c: token_baseline(x, c, "valid"),
    "optimal_token_baseline": lambda x, c: token_baseline(x, c, "column"),
    "opo": lambda x, c: adv.opo(sequence_scores(x), x["mask"].sum(1), x["group_id"]),
    "reinforce_plus_plus": lambda x, c: (
        adv.reinforce_plus_plus(x["rewards"], x["mask"], c["gamma"]),
        adv.discounted_returns(x["rewards"], x["mask"], c["gamma"]),
    ),
    "reinforce_plus_plus_baseline": lambda x, c: adv.reinforce_plus_plus_baseline(
        sequence_scores(x), x["group_id"], x["mask"]
    ),
    "remax": lambda x, c: (
        adv.remax(x["rewards"], x["reward_baselines"], x["mask"]),
        adv.discounted_returns(x["rewards"], x["mask"]),
    ),
    "rloo": lambda x, c: adv.rloo(sequence_scores(x), x["group_id"], singleton="raw"),
    "rloo_vectorized": per_group(adv.rloo),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEX[FAMILY]["cases"])
def test_golden(case):
    x, entry = arrays(FAMILY, case), INDEX[FAMILY]["cases"][case]
    estimator = case.split(".")[0]
    found = OURS[estimator](x, entry["config"])
    found = found if isinstance(found, tuple) else (found,)
    for name, ours in zip(entry["outputs"], found, strict=True):
        ours = ours if ours.dim() == 2 else ours[:, None] * x["mask"]
        if estimator in LOOSE and name == "advantages_out":
            same(ours, x[name], rtol=LOOSE[estimator])
        else:
            near(ours, x[name], f"{case} {name}")


SECOND_REWARDS = [0.0, 1.0, 1.0, 1.0, 0.0, 0.5, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
GREEDY = [0.75 * r + 0.1 * i for i, r in enumerate(REWARDS)]


def mean_and_std(i, rewards=REWARDS):
    group = [rewards[j] for j in members(i)]
    return (statistics.mean(group), statistics.stdev(group)) if len(group) > 1 else (0.0, 1.0)


def grpo_by_hand(i, rewards=REWARDS):
    mean, std = mean_and_std(i, rewards)
    return (rewards[i] - mean) / (std + 1e-6)


def rloo_by_hand(i):
    others = [REWARDS[j] for j in members(i) if j != i]
    return REWARDS[i] - statistics.mean(others) if others else 0.0


def opo_by_hand(i):
    group = members(i)
    if len(group) == 1:
        return REWARDS[i]
    return REWARDS[i] - sum(LENGTHS[j] * REWARDS[j] for j in group) / sum(LENGTHS[j] for j in group)


def pass_at_k_by_hand(i):
    ordered = sorted((REWARDS[j] for j in members(i)), reverse=True)
    return ordered[0] - ordered[1] if len(ordered) > 1 and REWARDS[i] == ordered[0] else 0.0


def gdpo_by_hand(counts):
    total = [2.0 * grpo_by_hand(i) - 0.5 * grpo_by_hand(i, SECOND_REWARDS) for i in range(12)]
    repeated = [x for x, n in zip(total, counts, strict=True) for _ in range(n)]
    mean, var = statistics.mean(repeated), statistics.variance(repeated)
    return [(x - mean) / math.sqrt(var + 1e-8) for x in total]


def gdpo(x, ids, lengths=None):
    both = torch.stack([x, of(SECOND_REWARDS).to(x.dtype)], 1)
    return adv.gdpo(both, ids, weights=of([2.0, -0.5]), lengths=lengths)


BY_HAND = {
    "grpo": (adv.grpo, lambda: [grpo_by_hand(i) for i in range(12)]),
    "dr_grpo": (
        lambda x, g: adv.grpo(x, g, scale="none"), lambda: [REWARDS[i] - mean_and_std(i)[0] for i in range(12)]
    ),
    "batch": (
        lambda x, g: adv.grpo(x, g, scale="batch", eps=1e-4),
        lambda: [(REWARDS[i] - mean_and_std(i)[0]) / (statistics.stdev(REWARDS) + 1e-4) for i in range(12)],
    ),
    "biased": (
        lambda x, g: adv.grpo(x, g, unbiased=False, eps=0.1, singleton="zero"),
        lambda: [
            (REWARDS[i] - statistics.mean(group)) / (statistics.pstdev(group) + 0.1)
            for i in range(12) for group in [[REWARDS[j] for j in members(i)]]
        ],
    ),
    "rloo": (adv.rloo, lambda: [rloo_by_hand(i) for i in range(12)]),
    "opo": (lambda x, g: adv.opo(x, torch.tensor(LENGTHS), g), lambda: [opo_by_hand(i) for i in range(12)]),
    "gpg": (
        lambda x, g: adv.gpg(x, g, f_norm=2.0),
        lambda: [12 / 11 * (REWARDS[i] - mean_and_std(i)[0]) / 2 for i in range(12)],
    ),
    "pass_at_k": (lambda x, g: adv.pass_at_k(x, g, scale="none"), lambda: [pass_at_k_by_hand(i) for i in range(12)]),
    "pass_at_k_std": (
        adv.pass_at_k,
        lambda: [pass_at_k_by_hand(i) / (mean_and_std(i)[1] + 1e-6) for i in range(12)],
    ),
    "gdpo": (gdpo, lambda: gdpo_by_hand([1] * 12)),
    "gdpo_tokens": (lambda x, g: gdpo(x, g, lengths=torch.tensor(LENGTHS)), lambda: gdpo_by_hand(LENGTHS)),
    "remax": (
        lambda x, g: adv.remax(x, of(GREEDY)), lambda: [r - s for r, s in zip(REWARDS, GREEDY, strict=True)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_formula(name):
    ours, expected = BY_HAND[name]
    found = ours(of(REWARDS), torch.tensor(IDS))
    assert found.dtype == torch.float64
    same(found, expected())
    narrow = ours(of(REWARDS).float(), torch.tensor(IDS, dtype=torch.int32))
    assert narrow.dtype == torch.float32
    same(narrow, expected(), rtol=1e-5)


@pytest.mark.parametrize("ours", [adv.grpo, adv.rloo, adv.pass_at_k, adv.gpg], ids=lambda f: f.__name__)
def test_the_order_of_rows_does_not_matter(ours):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    same(ours(of(REWARDS)[order], torch.tensor(IDS)[order]), ours(of(REWARDS), torch.tensor(IDS))[order])


def test_a_batch_in_parts_with_the_statistics_of_the_whole():
    x, ids = of(REWARDS), torch.tensor(IDS)
    s = adv.group_statistics(x, ids)
    zero = adv.group_statistics(x, ids, singleton="zero")
    spread, share = x.std().expand(12), 12 / 11

    def whole(f):
        return torch.cat([f(slice(0, 5)), f(slice(5, 12))])

    same(whole(lambda p: adv.grpo(x[p], mean=s.mean[p], std=s.std[p])), adv.grpo(x, ids))
    same(whole(lambda p: adv.grpo(x[p], mean=s.mean[p], scale="none")), adv.grpo(x, ids, scale="none"))
    parts = whole(lambda p: adv.grpo(x[p], mean=s.mean[p], std=spread[p], scale="batch"))
    same(parts, adv.grpo(x, ids, scale="batch"))
    same(whole(lambda p: adv.rloo(x[p], mean=zero.mean[p], count=zero.count[p])), adv.rloo(x, ids))
    same(whole(lambda p: adv.gpg(x[p], mean=s.mean[p], alpha=share)), adv.gpg(x, ids))
    same(adv.grpo(x[:0], ids[:0]), [])


def test_groups_without_a_signal_are_finite_and_zero():
    x, ids = of([0.1] * 7 + [0.3]), torch.tensor([1, 1, 1, 2, 2, 2, 2, 3])
    found = [f(x, ids) for f in (adv.grpo, adv.rloo, adv.pass_at_k, adv.gpg)]
    found += [adv.grpo(x, ids, scale="batch"), adv.opo(x, torch.tensor([3, 1, 2, 0, 0, 0, 0, 1]), ids)]
    for a in found:
        assert torch.equal(a[:7], torch.zeros(7, dtype=torch.float64))
    raw, zero = adv.grpo(x, ids)[7], adv.grpo(x, ids, singleton="zero")[7]
    assert (raw, zero) == (0.3 / (1 + 1e-6), 0.0)
    assert adv.rloo(x, ids)[7] == 0.0 and adv.rloo(x, ids, singleton="raw")[7] == 0.3
    assert adv.pass_at_k(x, ids)[7] == 0.0
    flat = adv.gdpo(torch.full((4, 2), 0.1), torch.tensor([0, 0, 1, 1]))
    assert torch.equal(flat, torch.zeros(4))


def test_pama():
    """Among all convex weights none makes a smaller combination."""
    values = torch.randn(5, 7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, shares = adv.pama(values), torch.linspace(0, 1, 2001, dtype=torch.float64)
    every = shares * values[..., :1] + (1 - shares) * values[..., 1:]
    nearest = every.gather(-1, every.abs().argmin(-1, keepdim=True))[..., 0]
    torch.testing.assert_close(found, nearest, rtol=0, atol=2e-3)
    assert (found[values.amin(-1) * values.amax(-1) < 0] == 0).all() and found.any()
    noon = adv.pama(values, form="noon")
    torch.testing.assert_close(noon, values.clamp(min=0).amin(-1))
    assert torch.equal(noon, found.clamp(min=0)) and torch.equal(adv.pama(values[..., :1]), values[..., 0])
    for call, message in (
        (lambda: adv.pama(values, form="moon"), "^form: got 'moon', accepted: signed, noon"),
        (lambda: adv.pama(values[..., :0]), r"^advantages: got shape \[5, 7, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
