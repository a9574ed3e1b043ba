"""GTPO against its authors' code (tests/golden) down to loss and gradients, against loops, and its edges."""

import math

import pytest
import torch
from cases import backends_to_test, device_of, thinned
from golden_data import INDEX, arrays, near

import tokenrl
from tokenrl import conflicts

CASES = [f"gtpo.{i}" for i in range(5)]


def token_entropy(logits):
    """As the authors have it, which clamps p inside the logarithm."""
    p = logits.softmax(-1)
    return -(p * p.clamp(min=1e-6).log()).sum(-1)


def golden(case):
    x, config = arrays("gtpo", case), INDEX["gtpo"]["cases"][case]["config"]
    one_group = torch.zeros(len(x["advantages"]), dtype=torch.int64)
    return x, config, (x["token_ids"], x["advantages"], one_group)


@pytest.mark.parametrize("case", CASES)
def test_golden_weights_and_advantages(case):
    x, config, rows = golden(case)
    weights = conflicts.conflict_weights(*rows, mask=x["mask"], positive=config["w_raw"])
    near(weights, x["weights"], "weights")
    lengths = conflicts.conflict_lengths(*rows, mask=x["mask"])
    assert lengths.dtype == torch.int64 and torch.equal(lengths, x["n_conflict"].long().clamp(min=1))
    shaped = conflicts.entropy_shaped_advantages(
        x["advantages"], token_entropy(x["logits"]), mask=x["mask"], scale=config["ent_scale"],
        threshold=config["ent_threshold"],
    )  # fmt: skip
    near(shaped, x["adv_shaped"], "advantages")
    exact = tokenrl.token_logprobs(x["logits"], x["token_ids"].long(), backend="reference").entropy
    near(conflicts.entropy_shaped_advantages(x["advantages"], exact, mask=x["mask"]), x["adv_shaped"], "A", 1e-6)


@pytest.mark.parametrize("backend, case", [(b, case) for b in backends_to_test() for case in thinned(CASES, b)])
def test_golden_loss_and_gradients(case, backend):
    x, _, rows = golden(case)
    weights = conflicts.conflict_weights(*rows, mask=x["mask"])
    weights = weights / conflicts.conflict_lengths(*rows, mask=x["mask"])[:, None]
    shaped = conflicts.entropy_shaped_advantages(x["advantages"], token_entropy(x["logits"]), mask=x["mask"])
    device = device_of(backend)
    logits = x["logits"].to(device).requires_grad_()
    logp = tokenrl.token_logprobs(logits, x["token_ids"].long().to(device), outputs=("logp",), backend=backend).logp
    loss, _ = tokenrl.policy_loss(
        "ppo", logp, None, shaped.to(device), mask=x["mask"].to(device), token_weight=weights.to(device),
        aggregation="seq-mean-token-mean", normalizer=1, backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad(loss, (logits, logp))
    for found, name in zip((loss, *grads), ("loss", "grad_logits", "grad_logp"), strict=True):
        near(found, x[name], name)


def loop_runs(ids, advantages, group_ids, mask, backward):
    """Per row the number of its tokens, from its start or end, that are in conflict without a gap."""
    tokens = [row[m].tolist()[:: -1 if backward else 1] for row, m in zip(ids, mask, strict=True)]
    signs = [(a > 0) - (a < 0) for a in advantages.tolist()]
    runs = []
    for row, own in enumerate(tokens):
        run = 0
        while signs[row] and run < len(own):
            there = {
                signs[j]
                for j, other in enumerate(tokens)
                if group_ids[j] == group_ids[row] and len(other) > run and other[run] == own[run]
            }
            if not {1, -1} <= there:
                break
            run += 1
        runs.append(run)
    return runs


def loop_weights(ids, advantages, group_ids, mask, positive, negative):
    out = torch.zeros(mask.shape, dtype=torch.float64)
    left, right = (loop_runs(ids, advantages, group_ids, mask, backward) for backward in (False, True))
    for row, a in enumerate(advantages.tolist()):
        columns = mask[row].nonzero().flatten().tolist()
        for place, t in enumerate(columns):
            hits = (place < left[row]) + (len(columns) - 1 - place < right[row])
            out[row, t] = (positive if a > 0 else negative) ** hits
    return out, [max(pair + (1,)) for pair in zip(left, right, strict=True)]


def batch(seed, rows=9, width=8, garbage=0):
    """Few ids, so that runs meet; groups of 1, 3 and 5 rows, not adjacent; holes, an empty row and a one-token row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 2, (rows, width), generator=generator)
    mask = torch.rand(rows, width, generator=generator) < 0.8
    mask[1], mask[4], mask[4, 3] = False, False, True
    advantages = torch.randint(-1, 2, (rows,), generator=generator).double() * 0.7
    group_ids = torch.tensor([5, -2, 5, 5, -2, 8, 5, -2, 5])
    return torch.where(mask, ids, garbage), advantages, group_ids, mask


def test_weights_are_their_loop():
    seen = set()
    for seed in range(40):
        ids, advantages, group_ids, mask = batch(seed)
        for positive, negative in ((2.0, 0.0), (1.7, 0.3)):
            found = conflicts.conflict_weights(
                ids, advantages, group_ids, mask=mask, positive=positive, negative=negative
            )
            expected, lengths = loop_weights(ids, advantages, group_ids, mask, positive, negative)
            near(found, expected, f"seed {seed}")
            assert conflicts.conflict_lengths(ids, advantages, group_ids, mask=mask).tolist() == lengths
        seen |= set(found[mask].tolist())
    assert len(seen) == 5, "1, and one or two factors of either sign"


def test_packed_groups_and_garbage_make_no_difference():
    for seed in range(10):
        ids, advantages, group_ids, mask = batch(seed)
        whole = conflicts.conflict_weights(ids, advantages, group_ids, mask=mask)
        other = batch(seed, garbage=2**40)
        assert torch.equal(conflicts.conflict_weights(*other[:3], mask=mask), whole)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
        mixed = conflicts.conflict_weights(ids[order], advantages[order], group_ids[order], mask=mask[order])
        assert torch.equal(mixed, whole[order])
        for group in group_ids.unique():
            of = group_ids == group
            assert torch.equal(
                conflicts.conflict_weights(ids[of], advantages[of], group_ids[of], mask=mask[of]), whole[of]
            )
        lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in mask]
        flat_ids, flat_mask, flat = (
            torch.cat([x[row, :n] for row, n in enumerate(lengths)]) for x in (ids.int(), mask, whole)
        )
        packed = {"mask": flat_mask, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
        assert torch.equal(conflicts.conflict_weights(flat_ids, advantages, group_ids, **packed), flat)
        rows = conflicts.conflict_lengths(ids, advantages, group_ids, mask=mask)
        assert torch.equal(conflicts.conflict_lengths(flat_ids, advantages, group_ids, **packed), rows)


def test_equal_rows_of_either_sign_are_in_conflict_throughout():
    ids, groups = torch.tensor([[4, 4, 4], [4, 4, 4], [4, 4, 4]]), torch.tensor([0, 0, 0])
    advantages = torch.tensor([1.0, -1.0, 0.0])
    weights = conflicts.conflict_weights(ids, advantages, groups)
    assert weights.dtype == torch.float32 and weights.tolist() == [[4.0] * 3, [0.0] * 3, [1.0] * 3]
    assert conflicts.conflict_lengths(ids, advantages, groups).tolist() == [3, 3, 1]
    assert conflicts.conflict_weights(ids, advantages, torch.arange(3)).eq(1).all(), "rows that are alone"
    assert conflicts.conflict_weights(ids, advantages.abs(), groups).eq(1).all(), "one sign"


def test_shaped_advantages_are_their_formula():
    for seed, dtype in ((0, torch.float64), (1, torch.float32)):
        _, advantages, _, mask = batch(seed)
        generator = torch.Generator().manual_seed(seed)
        entropy = torch.rand(mask.shape, generator=generator, dtype=torch.float64)
        entropy = torch.where(mask, entropy, math.nan).to(dtype)
        for scale, threshold in ((0.1, 0.5), (0.3, 0.55), (1.0, math.inf)):
            expected = []
            for row, a in enumerate(advantages.tolist()):
                x = entropy[row, mask[row]].double().tolist()
                mean = sum(x) / max(len(x), 1)
                expected.append(0.0 if mean > threshold else a - scale * mean)
            found = conflicts.entropy_shaped_advantages(
                advantages, entropy, mask=mask, scale=scale, threshold=threshold
            )
            near(found, torch.tensor(expected, dtype=torch.float64), "A'")
            ends = torch.arange(10) * 8
            flat = conflicts.entropy_shaped_advantages(
                advantages,
                entropy.reshape(-1),
                mask=mask.reshape(-1),
                cu_seqlens=ends,
                scale=scale,
                threshold=threshold,
            )
            assert torch.equal(flat, found)
            assert 0 < sum(x == 0.0 for x in expected) < 9 or threshold == math.inf
    at = torch.full((1, 4), 0.5)
    assert conflicts.entropy_shaped_advantages(torch.ones(1), at, threshold=0.5).item() == pytest.approx(0.95)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3)])
def test_batches_without_a_valid_token(shape):
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    advantages = torch.tensor([1.0, -1.0, 1.0])[: shape[0]]
    weights = conflicts.conflict_weights(ids, advantages, torch.zeros(shape[0]).long(), mask=mask)
    assert weights.shape == shape and not weights.any()
    assert conflicts.conflict_lengths(ids, advantages, torch.zeros(shape[0]).long(), mask=mask).eq(1).all()
    entropy = torch.full(shape, math.nan)
    assert torch.equal(conflicts.entropy_shaped_advantages(advantages, entropy, mask=mask), advantages)


IDS, A, G, H = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2), torch.tensor([0, 0]), torch.ones(2, 3)
ERRORS = [
    (lambda: conflicts.conflict_weights(H, A, G), "ids: got dtype torch.float32"),
    (lambda: conflicts.conflict_weights(IDS[0], A, G), r"ids: got shape \[3\] without cu_seqlens"),
    (lambda: conflicts.conflict_weights(IDS, H, G), r"advantages: got shape \[2, 3\], accepted: shape \[2\]"),
    (lambda: conflicts.conflict_weights(IDS, A.long(), G), "advantages: got dtype torch.int64"),
    (lambda: conflicts.conflict_weights(IDS, A.clone().requires_grad_(), G), "advantages: got a tensor that requires"),
    (lambda: conflicts.conflict_weights(IDS, A, None), "group_ids: got None, accepted: one integer per sequence"),
    (lambda: conflicts.conflict_lengths(IDS, A, G.float()), "group_ids: got dtype torch.float32"),
    (lambda: conflicts.conflict_lengths(IDS, A, G[:1]), r"group_ids: got \[1\]"),
    (lambda: conflicts.conflict_weights(IDS, A, G, mask=IDS), "mask: got dtype torch.int64"),
    (lambda: conflicts.entropy_shaped_advantages(A, IDS), "entropy: got dtype torch.int64"),
    (lambda: conflicts.entropy_shaped_advantages(A[:1], H), r"advantages: got shape \[1\]"),
    (lambda: conflicts.entropy_shaped_advantages(A, H.clone().requires_grad_()), "entropy: got a tensor that requires"),
    (lambda: conflicts.entropy_shaped_advantages(A, H, threshold=-1.0), "threshold: got -1.0"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
