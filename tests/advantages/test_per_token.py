"""Advantages over tokens against their formulas in loops, and their edges; verl's outputs: test_per_sequence.py."""

import math
import statistics

import pytest
import torch
from advantage_cases import IDS, LENGTHS, REWARDS, members, of, same
from golden_data import INDEX, arrays, near

from tokenrl import advantages as adv


def token_batch(rows=5, width=37, dtype=torch.float64):
    """A batch with holes, an empty row and a full one; masked cells hold NaN."""
    g = torch.Generator().manual_seed(3)
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[1], mask[2] = False, True
    x, v = torch.randn(2, rows, width, generator=g, dtype=torch.float64).to(dtype)
    return x.masked_fill(~mask, torch.nan), v.masked_fill(~mask, torch.nan), mask


def gae_by_hand(r, v, mask, gamma, lam):
    a = torch.zeros(mask.shape, dtype=torch.float64)
    for i in range(mask.shape[0]):
        next_value = last = 0.0
        for j in reversed(range(mask.shape[1])):
            if mask[i, j]:
                last = float(r[i, j]) + gamma * next_value - float(v[i, j]) + gamma * lam * last
                next_value = float(v[i, j])
                a[i, j] = last
    return a


def test_gae_that_counts_the_cells_of_holes():
    r, v, mask = token_batch()
    every = torch.ones_like(mask)
    a, returns = adv.gae(r, v, mask, 0.9, 0.8, whiten=False, holes="count")
    expected = gae_by_hand(r.nan_to_num(0.0), v.nan_to_num(0.0), every, 0.9, 0.8)
    same(a, torch.where(mask, expected, 0.0))
    same(returns, torch.where(mask, expected + v, 0.0))
    same(adv.gae(r, v, mask, 0.9, 0.8, holes="count")[0], whitened_by_hand(expected, mask))
    same(adv.gae(r[2:3], v[2:3], mask[2:3], 0.9, 0.8, holes="count")[0], adv.gae(r[2:3], v[2:3], None, 0.9, 0.8)[0])
    flat, cu = [x.reshape(-1) for x in (r, v, mask)], torch.arange(6) * 37
    same(adv.gae(*flat, 0.9, 0.8, whiten=False, holes="count", cu_seqlens=cu)[0].view(5, 37), a)
    with pytest.raises(ValueError, match="holes: got 'stop', accepted: skip, count"):
        adv.gae(r, v, mask, holes="stop")


def whitened_by_hand(x, mask):
    cells = x[mask].tolist()
    mean, var = statistics.mean(cells), statistics.variance(cells)
    return torch.where(mask, (x - mean) / math.sqrt(var + 1e-8), 0.0)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (0.5, 0.1), (0.9, 0.0), (0.0, 1.0)])
def test_token_estimators(gamma, lam):
    r, v, mask = token_batch()
    a, returns = adv.gae(r, v, mask, gamma, lam, whiten=False)
    expected = gae_by_hand(r, v, mask, gamma, lam)
    same(a, expected)
    same(returns, torch.where(mask, expected + v, 0.0))
    same(adv.gae(r, v, mask, gamma, lam)[0], whitened_by_hand(expected, mask))
    to_go = gae_by_hand(r, torch.zeros_like(r), mask, gamma, 1.0)
    same(adv.discounted_returns(r, mask, gamma), to_go)
    same(adv.reinforce_plus_plus(r, mask, gamma), whitened_by_hand(to_go, mask))


def test_discounts_of_each_row_are_those_of_a_call_per_row():
    r, v, mask = token_batch()
    gamma, lam = (torch.linspace(*ends, 5, dtype=torch.float64) for ends in ((1.0, 0.5), (0.0, 1.0)))
    cu = torch.arange(6) * 37
    for holes in ("skip", "count"):
        rows = [slice(i, i + 1) for i in range(5)]
        each = [adv.gae(r[i], v[i], mask[i], float(gamma[i]), float(lam[i]), whiten=False, holes=holes) for i in rows]
        expected = [torch.cat(parts) for parts in zip(*each, strict=True)]
        found = adv.gae(r, v, mask, gamma, lam, whiten=False, holes=holes)
        flat = (x.reshape(-1) for x in (r, v, mask))
        packed = adv.gae(*flat, gamma, lam, whiten=False, holes=holes, cu_seqlens=cu)
        for x, y, z in zip(found, packed, expected, strict=True):
            assert torch.equal(x, z) and torch.equal(y.view(5, 37), z)
    same(adv.gae(r, v, mask, gamma, 0.3, whiten=False)[0], torch.cat(
        [adv.gae(r[i], v[i], mask[i], float(gamma[i]), 0.3, whiten=False)[0] for i in rows]))  # fmt: skip
    returns = torch.cat([adv.discounted_returns(r[i], mask[i], float(gamma[i])) for i in rows])
    assert torch.equal(adv.discounted_returns(r, mask, gamma), returns)
    same(adv.reinforce_plus_plus(r, mask, gamma), whitened_by_hand(returns, mask))
    assert torch.equal(adv.discounted_returns(r, mask, gamma[1]), adv.discounted_returns(r, mask, float(gamma[1])))


def test_a_broadcast_baseline_is_whitened_over_tokens():
    x, ids = of(REWARDS[:5]), torch.tensor([0, 0, 1, 1, 1])
    mask = token_batch()[2]
    centred = adv.grpo(x, ids, scale="none")[:, None].expand(mask.shape)
    same(adv.reinforce_plus_plus_baseline(x, ids, mask), whitened_by_hand(centred, mask))


def test_packed_is_padded():
    r, v, mask = token_batch()
    r, v = r.nan_to_num(0.0), v.nan_to_num(0.0)
    cu = torch.tensor([0, 37, 74, 111, 148, 185], dtype=torch.int32)
    flat = [x.reshape(-1) for x in (r, v, mask)]
    for packed, padded in zip(adv.gae(*flat, 0.9, 0.8, cu_seqlens=cu), adv.gae(r, v, mask, 0.9, 0.8), strict=True):
        same(packed.view(5, 37), padded)
    ids, x = torch.tensor([4, 4, 0, 4, 0]), of(REWARDS[:5])
    packed = adv.reinforce_plus_plus_baseline(x, ids, flat[2], cu_seqlens=cu)
    same(packed.view(5, 37), adv.reinforce_plus_plus_baseline(x, ids, mask))
    for position in ("column", "valid"):
        packed = adv.otb(flat[0], ids, -flat[1].abs(), flat[1].square(), flat[2], position=position, cu_seqlens=cu)
        same(packed.view(5, 37), adv.otb(r, ids, -v.abs(), v.square(), mask, position=position))


def test_masked_cells_are_not_read():
    r, v, mask = token_batch(dtype=torch.float32)
    clean = [x.nan_to_num(0.0) for x in (r, v)]
    ids = torch.tensor([4, 4, 0, 4, 0])
    for found, expected in [
        (adv.gae(r, v, mask)[0], adv.gae(*clean, mask)[0]),
        (adv.otb(r, ids, v, v, mask), adv.otb(clean[0], ids, clean[1], clean[1], mask)),
        (adv.remax(r, r[2, :5], mask), adv.remax(clean[0], clean[0][2, :5], mask)),
        (adv.whiten(r, mask), adv.whiten(clean[0], mask)),
    ]:
        assert found.dtype == torch.float32
        assert torch.equal(found, expected) and not found[~mask].any()


def test_whitening_with_the_moments_of_a_larger_batch():
    r, _, mask = token_batch()
    x = adv.discounted_returns(r, mask, 0.9)
    mean, var = x[mask].mean(), x[mask].var()
    parts = [adv.whiten(x[p], mask[p], mean=mean, var=var) for p in (slice(0, 2), slice(2, 5))]
    same(torch.cat(parts), adv.reinforce_plus_plus(r, mask, 0.9))
    same(adv.whiten(x, mask, mean=1.0, var=4.0, eps=0.0), torch.where(mask, (x - 1) / 2, 0.0))


def test_no_token_and_one_token():
    r, v, mask = token_batch()
    nothing = torch.zeros_like(mask)
    for a in (*adv.gae(r, v, nothing), adv.reinforce_plus_plus(r, nothing), adv.otb(r, torch.arange(5), v, v, nothing)):
        assert a.shape == mask.shape and not a.any()
    nothing[2, 7] = True
    assert not adv.gae(r, v, nothing)[0].any()
    assert adv.gae(r, v, nothing)[1][2, 7] == r[2, 7]
    assert adv.discounted_returns(r[:, :0], mask[:, :0]).shape == (5, 0)


def test_a_long_row_does_not_lose_its_end_to_small_powers():
    r = torch.zeros(1, 20000, dtype=torch.float64)
    r[0, -1] = 1.0
    found = adv.discounted_returns(r, None, 0.9)
    same(found[0, -300:], [0.9 ** (299 - j) for j in range(300)])
    assert found.isfinite().all()


@pytest.mark.parametrize("case", [c for c in INDEX["hapo"]["cases"] if c.startswith("advantage.")])
def test_golden_hapo(case):
    x, config = arrays("hapo", case), INDEX["hapo"]["cases"][case]["config"]
    scale = "std" if config["norm_adv_by_std_in_grpo"] else "none"
    for width in (None, x["mask"].shape[1]):
        a = adv.hapo(
            x["rewards"].sum(1), x["mask"].sum(1), x["group_id"], scale=scale, eps=config["epsilon"], width=width
        )
        near(a[:, None] * x["mask"], x["advantages_out"], case)


def hapo_by_hand(rewards, lengths, limit, scale="std", width=None, eps=1e-6):
    out = []
    for i, reward in enumerate(rewards):
        own = [rewards[j] for j in members(i) for _ in range(lengths[j])]
        mean, std = (statistics.mean(own), statistics.pstdev(own)) if own else (0.0, 0.0)
        divisor = std + eps if scale == "std" else 1.0
        cells = list(own)
        if width is not None and any(lengths[j] < width for j in members(i)):
            cells.append(0.0)
        if len(members(i)) == 1 or lengths[i] == 0 or any(abs(x - mean) >= limit * divisor for x in cells):
            rows = [rewards[j] for j in members(i)]
            mean, std = (statistics.mean(rows), statistics.stdev(rows)) if len(rows) > 1 else (0.0, 1.0)
            divisor = std + eps if scale == "std" else 1.0
        out.append((reward - mean) / divisor)
    return out


# The largest |A| of the groups are 1.134, 0.99999 and three times 0; of padding in the second, 1.67. Undivided, 1.125.
@pytest.mark.parametrize("scale, limit, width", [
    ("std", 5.0, None), ("std", 1.1, None), ("std", 0.5, None), ("none", 1.0, None), ("std", 1.2, 6), ("none", 0.5, 3),
])  # fmt: skip
def test_hapo(scale, limit, width):
    x, n, ids = of(REWARDS), torch.tensor(LENGTHS), torch.tensor(IDS)
    expected = hapo_by_hand(REWARDS, LENGTHS, limit, scale, width)
    same(adv.hapo(x, n, ids, scale=scale, limit=limit, width=width), expected, rtol=1e-9)
    narrow = adv.hapo(x.float(), n.int(), ids.int(), scale=scale, limit=limit, width=width)
    assert narrow.dtype == torch.float32
    same(narrow, expected, rtol=1e-4)


def test_hapo_falls_back_group_by_group():
    x, n, ids = of(REWARDS), torch.tensor(LENGTHS), torch.tensor(IDS)
    never, always = adv.hapo(x, n, ids, limit=math.inf), adv.grpo(x, ids)
    far = [(never[ids == g][n[ids == g] > 0]).abs().max() >= 1.1 for g in IDS]
    assert {bool(f) for f, g in zip(far, IDS, strict=True) if IDS.count(g) > 1} == {False, True}
    same(adv.hapo(x, n, ids, limit=1.1), torch.where(torch.tensor(far) | (n == 0), always, never))
    ones = torch.ones_like(n)
    same(adv.hapo(x, ones, ids, limit=math.inf), adv.grpo(x, ids, unbiased=False))
    # The reward 0 of padding is far from rewards that are all about 1.
    near_one, pair, lengths = of([1.0, 1.01]), torch.tensor([0, 0]), torch.tensor([3, 4])
    assert not torch.equal(adv.hapo(near_one, lengths, pair), adv.grpo(near_one, pair))
    same(adv.hapo(near_one, lengths, pair, width=4), adv.grpo(near_one, pair))
    full = torch.tensor([4, 4])
    same(adv.hapo(near_one, full, pair, width=4), adv.hapo(near_one, full, pair))


def test_hapo_in_parts_with_the_statistics_of_the_whole():
    x, n, ids = of(REWARDS), torch.tensor(LENGTHS), torch.tensor(IDS)
    for options in ({}, {"limit": 1.1}, {"scale": "none"}):
        whole, s = adv.hapo(x, n, ids, **options), adv.hapo_statistics(x, n, ids, **options)
        scale = {"scale": options.get("scale", "std")}
        parts = [adv.hapo(x[p], mean=s.mean[p], std=s.std[p], **scale) for p in (slice(5), slice(5, 12))]
        assert torch.equal(torch.cat(parts), whole)
    assert adv.hapo(x[:0], n[:0], ids[:0]).shape == (0,)


def test_hapo_edges():
    x, ids = of([0.1, 0.1, 0.1, 0.7]), torch.tensor([3, 3, 3, 8])
    a = adv.hapo(x, torch.tensor([3, 0, 5, 2]), ids)
    assert torch.equal(a[:3], torch.zeros(3, dtype=torch.float64)) and a[3] == adv.grpo(x, ids)[3]
    assert adv.hapo(x, torch.tensor([3, 0, 5, 2]), ids, singleton="zero")[3] == 0.0
    assert adv.hapo(x, torch.zeros(4).long(), ids).isfinite().all()
    for call, message in (
        (lambda: adv.hapo(x, ids, ids, scale="batch"), "scale: got 'batch', accepted: std, none"),
        (lambda: adv.hapo(x, None, ids), "lengths: got None"),
        (lambda: adv.hapo(x, x, ids), "lengths: got dtype torch.float64"),
        (lambda: adv.hapo(x, ids), "group_ids: got None"),
        (lambda: adv.hapo(x, ids, ids, limit=0.0), "limit: got 0.0"),
        (lambda: adv.hapo(x, mean=x), "std: got None, accepted: both of mean and std"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
