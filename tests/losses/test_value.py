"""value_loss and its labels, advantages.prefix_values: the tree in loops, the losses by hand, errors."""

import pytest
import torch
from golden_data import near

import tokenrl
from tokenrl.advantages import prefix_tree, prefix_values


def batch(seed, rows=13, width=9):
    """Groups that are ragged and not adjacent; few ids, so that prefixes are shared; holes and empty rows."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2, (rows, width), generator=g)
    mask = torch.arange(width) < torch.randint(0, width + 1, (rows, 1), generator=g)
    mask &= torch.rand(rows, width, generator=g) > 0.15
    ids[1], mask[1] = ids[0], mask[0]  # the same response twice
    group_ids = torch.tensor([5, -3, 8])[torch.randint(0, 3, (rows,), generator=g)]
    group_ids[0] = group_ids[1]
    rewards = (torch.rand(rows, generator=g) > 0.5).double() if seed % 2 else torch.randn(rows, generator=g).double()
    return rewards, group_ids, ids, mask


def by_hand(rewards, group_ids, ids, mask):
    rows, width = mask.shape
    out = torch.zeros(rows, width, dtype=torch.float64)
    length = [max([j + 1 for j in range(width) if mask[i, j]], default=0) for i in range(rows)]
    for i in range(rows):
        for t in range(length[i]):
            with_it = [
                k for k in range(rows)
                if group_ids[k] == group_ids[i] and length[k] > t and torch.equal(ids[k, : t + 1], ids[i, : t + 1])
            ]  # fmt: skip
            if mask[i, t]:
                out[i, t] = sum(rewards[k].item() for k in with_it) / len(with_it)
    return out


@pytest.mark.parametrize("seed", range(6))
def test_prefix_values_in_loops(seed, monkeypatch):
    monkeypatch.setattr(prefix_tree, "BLOCK", 4)
    rewards, group_ids, ids, mask = batch(seed)
    expected = by_hand(rewards, group_ids, ids, mask)
    found = prefix_values(rewards, group_ids, ids, mask)
    near(found, expected, "labels", rtol=1e-12)
    if seed % 2:
        shared = (expected > 0) & (expected < 1)
        assert shared.any() and torch.equal(found[~shared], expected[~shared])  # 0 and 1 are exact
    past = torch.arange(ids.shape[1]) > torch.where(mask, torch.arange(ids.shape[1]), -1).amax(1, keepdim=True)
    near(prefix_values(rewards, group_ids, torch.where(past, -9, ids), mask), expected, "padding", rtol=1e-12)
    lengths = (~past).sum(1)
    boundaries = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    packed = prefix_values(rewards, group_ids, ids[~past], mask[~past], cu_seqlens=boundaries)
    near(packed, expected[~past], "packed", rtol=1e-12)


def test_prefix_values_of_few_responses():
    ids = torch.tensor([[4, 4, 1], [4, 4, 2]])
    both = torch.tensor([0, 0])
    assert prefix_values(torch.tensor([1.0, 0.0]), both, ids).tolist() == [[0.5, 0.5, 1], [0.5, 0.5, 0]]
    assert prefix_values(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), ids).tolist() == [[1] * 3, [0] * 3]
    assert prefix_values(torch.tensor([0.25]), both[:1], ids[:1, :1]).tolist() == [[0.25]]
    assert prefix_values(torch.zeros(0), both[:0], ids[:0]).shape == (0, 3)
    with pytest.raises(ValueError, match="^rewards: got NaN in 1 places"):
        prefix_values(torch.tensor([1.0, torch.nan]), both, ids)


@pytest.mark.parametrize("kind", ["mse", "bce"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_value_loss(layout, kind):
    g = torch.Generator().manual_seed(0)
    values, labels = torch.randn(3, 5, generator=g).double() * 3, torch.rand(3, 5, generator=g).double()
    mask = torch.rand(3, 5, generator=g) > 0.3
    values[0, 0] = 800.0  # where e^v overflows
    mask[0, 0] = True
    n, spoiled = mask.sum(), [torch.where(mask, x, torch.nan) for x in (values, labels)]
    how = {"mask": mask}
    if layout == "packed":
        spoiled = [x.flatten() for x in spoiled]
        how = {"mask": mask.flatten(), "cu_seqlens": torch.tensor([0, 4, 15])}
    leaf = spoiled[0].requires_grad_()
    loss = tokenrl.value_loss(leaf, spoiled[1], kind=kind, **how)
    if kind == "mse":
        expected, slope = (values - labels) ** 2, 2 * (values - labels)
    else:
        expected = torch.nn.functional.binary_cross_entropy_with_logits(values, labels, reduction="none")
        slope = values.sigmoid() - labels
    near(loss, expected[mask].mean(), "loss")
    near(torch.autograd.grad(loss, leaf)[0].view(3, 5), torch.where(mask, slope / n, 0), "gradient")
    halved = tokenrl.value_loss(leaf, spoiled[1], kind=kind, aggregation="token-sum", normalizer=2, **how)
    near(halved, expected[mask].sum() / 2, "of a normalizer")


def test_errors_of_value_loss():
    x = torch.zeros(2, 3)
    for given, message in (
        ({"kind": "mae"}, "kind: got 'mae', accepted: mse, bce"),
        ({"labels": x[1:]}, r"labels: got shape \[1, 3\], accepted: one value per token, \[2, 3\]"),
        ({"labels": x.clone().requires_grad_()}, "labels: got a tensor that requires grad"),
        ({"values": x.bfloat16()}, "values: got dtype torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            tokenrl.value_loss(**{"values": x, "labels": x} | given)
