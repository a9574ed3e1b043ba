"""Advantages per token against their formulas in loops, and their edges; verl's outputs: test_advantages.py."""

import math
import statistics

import pytest
import torch
from test_advantages import REWARDS, of, same

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
