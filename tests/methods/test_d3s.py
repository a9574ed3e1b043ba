"""D3S: the selection of rollouts against every subset, that of tokens against its definition in loops, and edges."""

import itertools
import math

import pytest
import torch

import tokenrl
from tokenrl import corrections, selection

VALID = torch.tensor(
    [[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0]]
).bool()
LENGTHS, ENDS = [5, 6, 0, 6, 4], torch.tensor([0, 5, 11, 11, 17, 21])


def batch(seed=0, garbage=math.nan):
    """(advantages [S] with a 0 and a sign of each kind, entropies [S, T])."""
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(5, generator=generator, dtype=torch.float64)
    advantages[seed % 5] = 0
    entropy = torch.randn(VALID.shape, generator=generator, dtype=torch.float64).exp()
    return advantages, torch.where(VALID, entropy, garbage)


def packed(x):
    return torch.cat([x[row, :n] for row, n in enumerate(LENGTHS)])


def variance(x):
    mean = sum(x) / len(x)
    return sum((v - mean) ** 2 for v in x) / len(x)


def test_no_subset_has_a_larger_variance():
    generator = torch.Generator().manual_seed(0)
    for rows in range(1, 11):
        for x in (torch.randn(rows, generator=generator), torch.randint(-1, 2, (rows,), generator=generator) + 1e6):
            x = x.double()
            for keep in range(1, rows + 1):
                chosen = selection.max_variance_rollouts(x, keep)
                assert chosen.dtype == torch.bool and chosen.sum() == keep
                best = max(variance(subset) for subset in itertools.combinations(x.tolist(), keep))
                assert variance(x[chosen].tolist()) == pytest.approx(best, rel=1e-12, abs=1e-15)


def test_ties_of_rollouts():
    def kept(values, keep, dtype=torch.float64):
        return selection.max_variance_rollouts(torch.tensor(values, dtype=dtype), keep).nonzero().flatten().tolist()

    assert kept([-1, -1, 1, 1, 0], 3) == [0, 2, 3], "of equal variances the one with more large advantages"
    assert kept([1, -1, 1, -1, 0], 1) == [2], "one row has no variance: the largest advantage, the last of them"
    assert kept([0.1, 0.1, 0.1, 0.1], 2, torch.float32) == [2, 3]
    assert kept([-1, -1, -1, 3], 2) == [2, 3], "both of them count as large"
    assert kept([-1, -1, -1, -0.5, 3], 2) == [0, 4], "the smaller ones from the first row on"
    assert kept([3, -0.5, 3, 3, -4], 2) == [3, 4], "the larger ones from the last row on"
    assert kept([-0.3, 0.3, 0.2], 3) == [0, 1, 2]
    assert kept([1.0, 2.0], 0) == [] and kept([], 0) == []
    assert kept([-1, 1] * 500, 6) == [0, 2, 4, 995, 997, 999]
    for seed in range(50):
        half = torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = torch.cat([0.3 + half, 0.3 - half])
        for keep in (3, 5, 7):
            large = selection.max_variance_rollouts(x, keep)[:8].sum()
            assert large == (keep + 1) // 2, "variances that differ by rounding errors only"


def test_schedule():
    assert [selection.d3s_schedule(p, 16, 64) for p in (0.0, 0.5, 1.0)] == [16, 40, 64]
    assert selection.d3s_schedule(0.25, 0.1, 0.5) == pytest.approx(0.2)
    assert selection.d3s_schedule(1, 0.1, 0.3) == 0.3


def loop_mask(advantages, entropy, fraction, scope):
    scores = {(r, t): abs(float(advantages[r])) * float(entropy[r, t]) for r, t in VALID.nonzero().tolist()}
    out = torch.zeros_like(VALID)
    for row, t in scores:
        rivals = sorted((s for at, s in scores.items() if scope == "batch" or at[0] == row), reverse=True)
        last = rivals[math.floor(1 + fraction * (len(rivals) - 1) + 1e-9) - 1]
        out[row, t] = scores[row, t] >= last
    return out


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.7, 1.0])
def test_tokens_are_their_loop(scope, fraction):
    seen = set()
    for seed in range(6):
        advantages, entropy = batch(seed)
        kept = selection.advantage_entropy_mask(advantages, entropy, fraction, mask=VALID, scope=scope)
        assert torch.equal(kept, loop_mask(advantages, entropy, fraction, scope))
        per_token = torch.where(VALID, advantages[:, None], math.nan)
        again = selection.advantage_entropy_mask(per_token, entropy, fraction, mask=VALID, scope=scope)
        assert torch.equal(again, kept)
        flat = selection.advantage_entropy_mask(
            advantages, packed(entropy), fraction, mask=packed(VALID), cu_seqlens=ENDS, scope=scope
        )
        assert torch.equal(flat, packed(kept))
        seen |= set(kept[VALID].tolist())
    assert seen == ({True} if fraction == 1 else {True, False})


def test_equal_advantages_make_it_the_rule_of_the_highest_entropies():
    for seed, fraction in itertools.product(range(5), (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)):
        _, entropy = batch(seed)
        ones = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
        kept = selection.advantage_entropy_mask(ones, entropy, fraction, mask=VALID)
        assert torch.equal(kept, corrections.top_entropy_mask(entropy, quantile=fraction, mask=VALID))


def test_ties_of_tokens_are_kept_and_the_count_is_not_lost_to_rounding():
    ones = torch.ones(1, 11, dtype=torch.float64)
    assert selection.advantage_entropy_mask(ones, ones, 0.1).all()
    steps = torch.arange(11.0).double()[None]
    assert selection.advantage_entropy_mask(ones, steps, 0.7).sum() == 8
    assert selection.advantage_entropy_mask(ones, steps, 0.3, scope="sequence").sum() == 4
    steps = torch.arange(101.0).double()[None]
    assert selection.advantage_entropy_mask(torch.ones(1), steps, 0.29).sum() == 30, "0.29 * 100 is less than 29"
    some = torch.tensor([[math.nan, 1.0, 2.0]])
    assert not selection.advantage_entropy_mask(some, torch.ones(1, 3), threshold=0.5)[0, 0], "NaN is not kept"


def test_a_split_batch_is_the_same_and_masked_cells_do_not_matter():
    advantages, entropy = batch()
    threshold = selection.advantage_entropy_threshold(advantages, entropy, 0.4, mask=VALID)
    whole = selection.advantage_entropy_mask(advantages, entropy, 0.4, mask=VALID)
    rows = selection.advantage_entropy_mask(advantages, entropy, 0.4, mask=VALID, scope="sequence")
    assert 0 < whole.sum() < VALID.sum() and not torch.equal(whole, rows)
    parts = (slice(2), slice(2, 3), slice(3, 5))
    for given in (threshold, float(threshold)):
        found = [
            selection.advantage_entropy_mask(advantages[p], entropy[p], mask=VALID[p], threshold=given) for p in parts
        ]
        assert torch.equal(torch.cat(found), whole)
    found = [
        selection.advantage_entropy_mask(advantages[p], entropy[p], 0.4, mask=VALID[p], scope="sequence") for p in parts
    ]
    assert torch.equal(torch.cat(found), rows)
    for garbage in (math.inf, -math.inf, 1e9):
        other = batch(garbage=garbage)
        assert torch.equal(selection.advantage_entropy_mask(*other, 0.4, mask=VALID), whole)
        assert torch.equal(selection.advantage_entropy_mask(*other, 0.4, mask=VALID, scope="sequence"), rows)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3)])
def test_batches_without_a_valid_token(shape):
    entropy, mask, advantages = torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool), torch.ones(shape[0])
    assert selection.advantage_entropy_threshold(advantages, entropy, 0.5, mask=mask) == math.inf
    for scope in ("batch", "sequence"):
        kept = selection.advantage_entropy_mask(advantages, entropy, 0.5, mask=mask, scope=scope)
        assert kept.shape == shape and not kept.any()


def test_both_levels_together_as_the_mask_of_a_loss():
    """The selected tokens alone pay, and they alone are counted."""
    advantages, entropy = batch(3)
    rows = selection.max_variance_rollouts(advantages, 3)
    mask = VALID & rows[:, None]
    kept = selection.advantage_entropy_mask(advantages, entropy, 0.5, mask=mask)
    assert not kept[~mask].any() and 0 < kept.sum() < mask.sum()
    logp = torch.zeros(VALID.shape, dtype=torch.float64, requires_grad=True)
    loss, _ = tokenrl.policy_loss(
        "ppo", logp, None, advantages, mask=kept, aggregation="token-mean", backend="reference"
    )
    loss.backward()
    expected = torch.where(kept, -advantages[:, None] / kept.sum(), 0.0)
    assert torch.allclose(logp.grad, expected, rtol=1e-12, atol=0)


A, H = torch.ones(2), torch.ones(2, 3)
ERRORS = [
    (lambda: selection.d3s_schedule(1.5, 1, 2), r"progress: got 1.5, accepted: a number in \[0, 1\]"),
    (lambda: selection.max_variance_rollouts(A, 3), "keep: got 3, accepted: an integer from 0 to .* 2"),
    (lambda: selection.max_variance_rollouts(A, 1.0), "keep: got 1.0"),
    (lambda: selection.max_variance_rollouts(A, -1), "keep: got -1"),
    (lambda: selection.max_variance_rollouts(A.long(), 1), r"advantages: got dtype torch.int64"),
    (lambda: selection.max_variance_rollouts(H, 1), r"advantages: got shape \[2, 3\], accepted: \[S\]"),
    (lambda: selection.max_variance_rollouts(A * math.nan, 1), "advantages: got values that are not finite"),
    (lambda: selection.max_variance_rollouts(A.clone().requires_grad_(), 1), "advantages: got a tensor that requires"),
    (lambda: selection.advantage_entropy_mask(A, H), "fraction: got None, accepted: a fraction, or a threshold"),
    (lambda: selection.advantage_entropy_mask(A, H, 0.5, threshold=1.0), "fraction: got 0.5"),
    (lambda: selection.advantage_entropy_mask(A, H, 0.0), "fraction: got 0.0, accepted: the fraction of tokens"),
    (lambda: selection.advantage_entropy_threshold(A, H, 1.1), "fraction: got 1.1"),
    (lambda: selection.advantage_entropy_mask(A, H, 0.5, scope="row"), "scope: got 'row', accepted: sequence, batch"),
    (
        lambda: selection.advantage_entropy_mask(A, H, threshold=1.0, scope="sequence"),
        "threshold: got 1.0, accepted: None",
    ),
    (lambda: selection.advantage_entropy_mask(A, H, threshold=H), "threshold: got a tensor of shape"),
    (lambda: selection.advantage_entropy_mask(A[:1], H, 0.5), r"advantages: got shape \[1\]"),
    (
        lambda: selection.advantage_entropy_mask(A.clone().requires_grad_(), H, 0.5),
        "advantages: got a tensor that requires",
    ),
    (
        lambda: selection.advantage_entropy_mask(A, H.clone().requires_grad_(), 0.5),
        "entropy: got a tensor that requires",
    ),
    (lambda: selection.advantage_entropy_mask(A, H.half(), 0.5), "entropy: got dtype torch.float16"),
    (lambda: selection.advantage_entropy_mask(A, H, 0.5, mask=H), "mask: got dtype torch.float32"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
