"""RTO's token rewards against its official outputs, lengths and budgets against their formulas."""

import math

import pytest
import torch
from golden_data import INDEX, arrays, near

import tokenrl
from tokenrl import advantages as adv
from tokenrl import rewards as rew


@pytest.mark.parametrize("case", INDEX["rto"]["cases"])
def test_golden_rto(case):
    x, config = arrays("rto", case), INDEX["rto"]["cases"][case]["config"]
    mask = x["mask"]
    options = {"scale": config["dpo_reward_scale"], "clip": config["dpo_reward_clip"] or None}
    logps = (x["dpo_logp"], x["ref_logp"], x["old_logp"])
    near(rew.rto(*logps, 0 * x["rewards"], mask, kl_coef=0.0, **options), x["token_reward"], "token reward")
    r = rew.rto(*logps, x["rewards"], mask, kl_coef=config["kl_coef"], **options)
    near(r, x["reward_out"], "reward")
    found = adv.gae(r, x["values"], mask, config["gamma"], config["lam"], whiten=False, holes="count")
    for name, ours in zip(("advantages_out", "returns_out"), found, strict=True):
        near(ours, torch.where(mask, x[name], 0.0), name)


def rto_by_hand(dpo, ref, old, rewards, mask, scale, clip, kl_coef, reward_clip):
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for i, row in enumerate(mask.tolist()):
        valid = [j for j, m in enumerate(row) if m]
        for j in valid:
            out[i, j] = min(max(scale * (dpo[i, j] - ref[i, j]), -clip), clip) - kl_coef * (old[i, j] - ref[i, j])
        if valid:
            out[i, valid[-1]] += min(max(float(rewards[i]), -reward_clip), reward_clip)
    return out


def random_batch(seed=0, rows=6, width=13):
    """Holes, an empty row, a row of one token; masked cells hold NaN and infinities."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[1], mask[2] = False, torch.arange(width) == 4
    logps = -torch.rand(3, rows, width, generator=g, dtype=torch.float64) * 3
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.arange(width) % 3].double()
    return [torch.where(mask, x, garbage) for x in logps], 6 * torch.randn(rows, generator=g).double(), mask


@pytest.mark.parametrize("bounds", [(0.3, 0.2, 0.1, 5.0), (1.0, math.inf, 0.0, math.inf)])
def test_rto(bounds):
    logps, rewards, mask = random_batch()
    expected = rto_by_hand(*logps, rewards, mask, *bounds)
    scale, clip, kl_coef, reward_clip = (None if b == math.inf else b for b in bounds)
    options = {"scale": scale, "clip": clip, "kl_coef": kl_coef, "reward_clip": reward_clip}
    found = rew.rto(*logps, rewards, mask, **options)
    near(found, expected, "rto")
    narrow = rew.rto(*(x.float() for x in logps), rewards.float(), mask, **options)
    assert narrow.dtype == torch.float32
    near(narrow, expected, "fp32", rtol=1e-4)
    width = mask.shape[1]
    cells = torch.arange(width) < torch.where(mask, torch.arange(1, width + 1), 0).amax(1)[:, None]
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), cells.sum(1).cumsum(0)])
    packed = rew.rto(*(x[cells] for x in logps), rewards, mask[cells], cu_seqlens=cu, **options)
    assert torch.equal(packed, found[cells])
    parts = [rew.rto(*(x[p] for x in logps), rewards[p], mask[p], **options) for p in (slice(2), slice(2, 6))]
    assert torch.equal(torch.cat(parts), found)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3)])
def test_rto_without_a_valid_token(shape):
    x, mask = torch.full(shape, torch.nan), torch.zeros(shape, dtype=torch.bool)
    r = rew.rto(x, x, x, torch.ones(shape[0]), mask)
    assert r.shape == shape and not r.any()


def test_rto_at_the_reference_is_the_reward_alone():
    x = -torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    r = rew.rto(x, x, x, torch.tensor([1.0, -40.0]), torch.tensor([[True, True, False, False], [True] * 4]))
    assert r.tolist() == [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, -10.0]]


def test_token_rewards_sum_to_the_reward_of_dpo():
    """And are those of an RTO without clamps, KL and outcome; packed is padded."""
    g = torch.Generator().manual_seed(0)
    logp, ref = (-torch.rand(4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(4, 6, generator=g) > 0.3
    found = rew.token_rewards(torch.where(mask, logp, torch.nan), ref, mask, beta=0.3)
    metrics = tokenrl.preference_loss(tokenrl.preference("dpo", beta=0.3), logp, ref, mask=mask)[1]
    near(found.sum(1), torch.cat([metrics.chosen_rewards, metrics.rejected_rewards]), "rewards")
    same = rew.rto(logp, ref, ref, torch.zeros(4), mask, scale=0.3, clip=None, kl_coef=0.0)
    near(found, same, "rto")
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    near(rew.token_rewards(logp[mask], ref[mask], beta=0.3, cu_seqlens=boundaries), found[mask], "packed")


def test_overlong_penalty():
    lengths = torch.tensor([0, 1, 60, 79, 80, 81, 90, 99, 100, 101, 130])
    paper, verl = [], []
    for n in lengths.tolist():
        paper.append(0.0 if n <= 80 else (80 - n) / 20 if n <= 100 else -1.0)
        verl.append(min(-(n - 80) / 20 * 0.5, 0))
    limits = {"max_length": 100, "buffer": 20}
    found = rew.overlong_penalty(lengths, **limits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(paper), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        rew.overlong_penalty(lengths.int(), **limits, factor=0.5, floor=None), torch.tensor(verl), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(rew.overlong_penalty(lengths, **limits, factor=0.5), found / 2, rtol=0, atol=0)
    assert rew.overlong_penalty(lengths[:0], **limits).shape == (0,)


def test_overlong_mask():
    lengths = torch.tensor([3, 9, 10, 10, 11])
    assert rew.overlong_mask(lengths, max_length=10).tolist() == [True, True, False, False, False]
    finished = torch.tensor([False, True, True, False, True])
    assert rew.overlong_mask(lengths, max_length=10, finished=finished).tolist() == [True, True, True, False, True]


def test_reasoning_budget():
    for step in range(11):
        assert rew.reasoning_budget(step / 10) == max(1, math.floor(800 * 0.2 ** (step / 10)))
    assert (rew.reasoning_budget(0.0), rew.reasoning_budget(1.0)) == (800, 160)
    assert rew.reasoning_budget(1.0, initial=10, minimum=3) == 3
    assert rew.reasoning_budget(0.5, initial=10, gamma=1.0) == 10


def test_length_reward_and_the_mix():
    lengths = torch.tensor([0, 10, 40, 41, 60, 80, 81, 500])
    expected = [2.0 * (n / 40 if n <= 40 else (80 - n) / 40 if n <= 80 else 0.0) for n in lengths.tolist()]
    found = rew.length_reward(lengths, 40, 2.0)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert found.max() == found[2] == 2.0
    correct = torch.arange(8) % 2 == 0
    mixed = rew.rmt_reward(correct, found, 0.25)
    torch.testing.assert_close(mixed, torch.where(correct, 0.75, 0.0) + 0.25 * found)
    assert torch.equal(rew.rmt_reward(correct, found, 0.0), correct.float())
    assert torch.equal(rew.rmt_reward(correct, found.double(), 1.0), found.double())


@pytest.mark.parametrize("name", ["kl_k1", "kl_abs", "kl_k2", "kl_k3"])
def test_kl_in_the_reward_is_verls(name):
    """The values of verl's kl_penalty; masked cells give 0 whatever they hold."""
    kinds = {"kl_k1": "k1", "kl_abs": "abs", "kl_k2": "k2", "kl_k3": "k3"}
    cases = INDEX["verl_kl_penalty"]["cases"]
    names = [c for c, entry in cases.items() if entry["config"]["kl_penalty"] == kinds[name]]
    assert names
    for case in names:
        x = arrays("verl_kl_penalty", case)
        found = rew.kl_estimate(x["logp"], x["ref_logp"], kl=name)
        inside = ((x["logp"] - x["ref_logp"]).abs() < 20) & (x["kl"] < 10)  # clamps differ beyond
        assert inside.float().mean() > 0.5
        near(found[inside], x["kl"][inside], name)
    mask = torch.rand(x["logp"].shape, generator=torch.Generator().manual_seed(0)) > 0.3
    dirty = [torch.where(mask, y, math.nan) for y in (x["logp"], x["ref_logp"])]
    near(rew.kl_estimate(*dirty, mask, kl=name), torch.where(mask, found, 0.0), "masked")


R, N = torch.zeros(2, 3), torch.tensor([1, 2])
ERRORS = [
    (lambda: rew.rto(R, R, R[0], R[:, 0]), r"old_logp: got shape \[3\] without cu_seqlens"),
    (lambda: rew.rto(R[:1], R, R, R[:, 0]), r"dpo_logp: got shape \[1, 3\]"),
    (lambda: rew.rto(R, R.clone().requires_grad_(), R, R[:, 0]), "ref_logp: got a tensor that requires grad"),
    (lambda: rew.rto(R, R, R, R), r"rewards: got shape \[2, 3\], accepted: shape \[2\]"),
    (lambda: rew.rto(R, R, R, R[:, 0], clip=0.0), "clip: got 0.0, accepted: a positive number, or None"),
    (lambda: rew.rto(R, R, R, R[:, 0], kl_coef=-1.0), "kl_coef: got -1.0"),
    (lambda: rew.kl_estimate(R, R, kl="ppo"), "kl: got 'ppo', accepted: kl_abs, kl_k1"),
    (lambda: rew.kl_estimate(R, R.clone().requires_grad_()), "ref_logp: got a tensor that requires grad"),
    (lambda: rew.overlong_penalty(N.float(), max_length=4, buffer=2), "lengths: got dtype torch.float32"),
    (lambda: rew.overlong_penalty(R.long(), max_length=4, buffer=2), r"lengths: got shape \[2, 3\]"),
    (lambda: rew.overlong_penalty(N, max_length=4, buffer=0), "buffer: got 0, .*at most max_length, 4"),
    (lambda: rew.overlong_penalty(N, max_length=4, buffer=5), "buffer: got 5"),
    (lambda: rew.overlong_penalty(N, max_length=4, buffer=2, floor=1.0), "floor: got 1.0"),
    (lambda: rew.overlong_mask(N, max_length=4, finished=N), r"finished: got torch.int64 \[2\]"),
    (lambda: rew.reasoning_budget(1.5), r"progress: got 1.5, accepted: a number in \[0, 1\]"),
    (lambda: rew.reasoning_budget(0.5, gamma=0.0), "gamma: got 0.0"),
    (lambda: rew.reasoning_budget(0.5, minimum=0), "minimum: got 0"),
    (lambda: rew.length_reward(N, 0, 1.0), "budget: got 0"),
    (lambda: rew.rmt_reward(N, R[:, 0], 0.5), r"correct: got torch.int64 \[2\]"),
    (lambda: rew.rmt_reward(N > 1, N, 0.5), "length_rewards: got dtype torch.int64"),
    (lambda: rew.rmt_reward(N > 1, R[:, 0], 2.0), "weight: got 2.0"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
