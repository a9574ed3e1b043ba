"""TEMPO against its official outputs and against a walk of the tree in loops."""

import itertools

import pytest
import torch
from golden_data import INDEX, arrays, near

from tokenrl import advantages as adv
from tokenrl.advantages import prefix_tree as module

WAYS = list(itertools.product(module.HOLES, module.ENDS))


@pytest.mark.parametrize("case", INDEX["tempo"]["cases"])
def test_golden(case):
    x, config = arrays("tempo", case), INDEX["tempo"]["cases"][case]["config"]
    scale = "std" if config["norm_adv_by_std_in_grpo"] else "none"

    def ours(**options):
        rows = (x["rewards"].sum(1), x["group_id"], x["token_ids"], x["mask"])
        return adv.tempo(*rows, scale=scale, eps=config["epsilon"], **options)

    expected = torch.where(x["mask"], x["advantages_out"], 0.0)
    near(ours(ends="cells"), expected, case)
    if "pad_equal" in case:
        # The response that samples the id of the padding leaves the one that has ended there, not where that id stops.
        assert (ours() - expected)[0].nonzero()[:, 0].tolist() == [8, 11]
        assert torch.equal(ours()[1:], ours(ends="cells")[1:])
    else:
        near(ours(), expected, case)


def by_hand(rewards, group_ids, ids, mask, scale="std", eps=1e-6, holes="stop", ends="valid"):
    out = torch.zeros(mask.shape, dtype=torch.float64)
    width, base = mask.shape[1], adv.grpo(rewards, group_ids, scale=scale, eps=eps)
    divisor = adv.group_statistics(rewards, group_ids).std + eps if scale == "std" else torch.ones_like(rewards)
    rows = range(len(rewards))
    length = [width if ends == "cells" else max([j + 1 for j in range(width) if mask[i, j]], default=0) for i in rows]
    for i in rows:
        before = [k for k in rows if group_ids[k] == group_ids[i]]
        walking = True
        for j in range(length[i]):
            after = [k for k in before if length[k] > j and ids[k, j] == ids[i, j]]
            step = sum(float(rewards[k]) for k in after) / len(after)
            step -= sum(float(rewards[k]) for k in before) / len(before)
            before = after
            walking = walking and (holes == "skip" or bool(mask[i, j]))
            if mask[i, j]:
                out[i, j] = base[i] + (step / divisor[i] if walking else 0.0)
    return out


def random_batch(seed, rows=11, width=17):
    """Groups that are ragged and not adjacent, responses that part at different places, holes, empty rows; row 0 is
    alone and row 1 has one token."""
    g = torch.Generator().manual_seed(seed)
    swaps = 0.4 * torch.rand(1, generator=g)
    ids = torch.where(
        torch.rand(rows, width, generator=g) < swaps, torch.randint(0, 4, (rows, width), generator=g), 7 - 2**40
    )
    mask = torch.arange(width) < torch.randint(0, width + 1, (rows, 1), generator=g)
    mask &= torch.rand(rows, width, generator=g) > 0.1 * (seed % 3)
    group_ids = torch.tensor([9, -4, 2])[torch.randint(0, 3, (rows,), generator=g)]
    group_ids[0], mask[1] = 100, torch.arange(width) == 0
    rewards = torch.randn(rows, generator=g, dtype=torch.float64)
    return rewards, group_ids, ids, mask


@pytest.mark.parametrize("holes, ends", WAYS)
@pytest.mark.parametrize("scale", module.SCALES)
def test_walk(monkeypatch, scale, holes, ends):
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "CELLS", 8)
    options = {"scale": scale, "eps": 0.1, "holes": holes, "ends": ends}
    branches = 0
    for seed in range(40):
        case = random_batch(seed, rows=3 + seed % 30)
        expected = by_hand(*case, **options)
        near(adv.tempo(*case, **options), expected, f"seed {seed}")
        plain = torch.where(case[3], adv.grpo(case[0], case[1], scale=scale, eps=0.1)[:, None], 0.0)
        branches += int(((expected - plain).abs() > 1e-9).sum())
    assert branches > 400


def test_rows_that_leave_one_by_one_do_not_cost_a_round_each(monkeypatch):
    rounds, common = [], module._common
    monkeypatch.setattr(module, "_common", lambda *pairs: rounds.append(pairs) or common(*pairs))
    rows = 64
    ids, mask = torch.ones(rows, rows).tril(-1).long(), torch.ones(rows, rows, dtype=torch.bool)
    rewards = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chain = rewards, torch.zeros(rows).long(), ids, mask
    for case in (chain, tuple(x.flip(0) for x in chain)):
        rounds.clear()
        near(adv.tempo(*case), by_hand(*case), "a chain")
        assert len(rounds) <= 16


@pytest.mark.parametrize("holes, ends", WAYS)
def test_packed_is_padded(holes, ends):
    for seed in range(6):
        rewards, group_ids, ids, mask = random_batch(seed)
        options = {"holes": holes, "ends": ends}
        padded = adv.tempo(rewards, group_ids, ids, mask, **options)
        width = mask.shape[1]
        # With "cells" the padding is part of a row; else a pack holds less of it.
        kept = torch.where(mask, torch.arange(1, width + 1), 0).amax(1) if ends == "valid" else torch.tensor(width)
        cells = torch.arange(width) < kept.expand(len(rewards))[:, None]
        cu = torch.cat([torch.zeros(1, dtype=torch.int64), cells.sum(1).cumsum(0)])
        packed = adv.tempo(rewards, group_ids, ids[cells], mask[cells], cu_seqlens=cu, **options)
        assert torch.equal(packed, padded[cells])


def test_no_mask_is_a_full_one_and_rows_may_come_in_any_order():
    rewards, group_ids, ids, mask = random_batch(3)
    assert torch.equal(adv.tempo(rewards, group_ids, ids), adv.tempo(rewards, group_ids, ids, torch.ones_like(mask)))
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1))
    moved = adv.tempo(rewards[order], group_ids[order], ids[order], mask[order])
    near(moved, adv.tempo(rewards, group_ids, ids, mask)[order], "order")


def test_padding_is_not_read_and_holes_are():
    rewards, group_ids, ids, mask = random_batch(1)
    expected = adv.tempo(rewards, group_ids, ids, mask, holes="skip")
    after = ~mask.flip(1).cummax(1).values.flip(1)
    for garbage in (0, 3, -(2**62)):
        assert torch.equal(adv.tempo(rewards, group_ids, ids.masked_fill(after, garbage), mask, holes="skip"), expected)
    # Two rows whose tool outputs differ part there, so that what follows is no branch.
    ids, mask = torch.tensor([[5, 1, 6, 7], [5, 2, 6, 8]]), torch.tensor([[True, False, True, True]] * 2)
    for second, branch in ((2, False), (1, True)):
        ids[1, 1] = second
        a = adv.tempo(torch.tensor([0.0, 1.0]), torch.zeros(2).long(), ids, mask, holes="skip", scale="none")
        assert a[1].tolist() == [0.5, 0.0, 0.5, 1.0 if branch else 0.5]


def test_the_changes_of_value_add_up_to_the_advantage():
    rewards, group_ids, ids, mask = random_batch(5, rows=20)
    ids[:, -1], mask[:] = torch.arange(20), True  # everybody ends alone
    centred = adv.grpo(rewards, group_ids, scale="none", singleton="zero")
    a = adv.tempo(rewards, group_ids, ids, mask, scale="none", singleton="zero")
    near((a - centred[:, None]).sum(1), centred, "telescope")
    same = ids[:1].expand_as(ids)
    near(adv.tempo(rewards, group_ids, same, mask), adv.grpo(rewards, group_ids)[:, None].expand_as(a), "no branch")
    flat = adv.tempo(torch.full_like(rewards, 0.1), torch.zeros_like(group_ids), ids, mask)
    assert torch.equal(flat, torch.zeros_like(flat))


def test_a_group_of_one_and_a_finished_response():
    ids = torch.tensor([[1, 2, 0], [1, 2, 3]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards, alone, pair = torch.tensor([0.5, 1.0]), torch.tensor([0, 1]), torch.tensor([4, 4])
    for singleton in ("raw", "zero"):
        base = adv.grpo(rewards, alone, singleton=singleton)
        a = adv.tempo(rewards, alone, ids, mask, singleton=singleton)
        assert a.dtype == torch.float32 and torch.equal(a, torch.where(mask, base[:, None], 0.0))
    a = adv.tempo(rewards, pair, ids, mask, scale="none")
    assert a.tolist() == [[-0.25, -0.25, 0.0], [0.25, 0.25, 0.5]]


def test_a_batch_in_parts_with_the_statistics_of_the_whole():
    rewards, group_ids, ids, mask = random_batch(7)
    whole = adv.tempo(rewards, group_ids, ids, mask)
    s = adv.group_statistics(rewards, group_ids)
    for part in (group_ids == 2, group_ids != 2):
        given = {"mean": s.mean[part], "std": s.std[part]}
        assert torch.equal(adv.tempo(rewards[part], group_ids[part], ids[part], mask[part], **given), whole[part])
        assert torch.equal(adv.tempo(rewards[part], group_ids[part], ids[part], mask[part]), whole[part])
    wide = adv.tempo(rewards, group_ids, ids, mask, std=2 * s.std, eps=0.0)
    near(wide, adv.tempo(rewards, group_ids, ids, mask, eps=0.0) / 2, "std")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3)])
def test_batches_without_a_valid_token(shape):
    mask, ids = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.int64)
    for holes, ends in WAYS:
        a = adv.tempo(torch.ones(shape[0]), torch.zeros(shape[0]).long(), ids, mask, holes=holes, ends=ends)
        assert a.shape == shape and not a.any()


X, G, IDS = torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), torch.zeros(2, 3, dtype=torch.int64)
ERRORS = [
    ({"scale": "batch"}, "scale: got 'batch', accepted: std, none"),
    ({"holes": "hop"}, "holes: got 'hop', accepted: stop, skip"),
    ({"ends": "pad"}, "ends: got 'pad', accepted: valid, cells"),
    ({"singleton": "one"}, "singleton: got 'one'"),
    ({"ids": IDS.float()}, "ids: got dtype torch.float32, accepted: integers"),
    ({"ids": IDS[0]}, r"ids: got shape \[3\] without cu_seqlens"),
    ({"mask": IDS}, "mask: got dtype torch.int64"),
    ({"rewards": torch.ones(3)}, r"rewards: got shape \[3\], accepted: one value per sequence, \[2\]"),
    ({"rewards": torch.ones(2, requires_grad=True)}, "rewards: got a tensor that requires grad"),
    ({"group_ids": G.float()}, "group_ids: got dtype torch.float32"),
    ({"std": X[:1]}, r"std: got shape \[1\]"),
]


@pytest.mark.parametrize("given, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(given, message):
    with pytest.raises(ValueError, match=message):
        adv.tempo(**({"rewards": X, "group_ids": G, "ids": IDS} | given))
