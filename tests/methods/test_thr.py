"""THR and NTHR against their double sums over token pairs in loops, and their edges."""

import itertools
import math

import pytest
import torch
from golden_data import near

from tokenrl import hidden_reward as hr
from tokenrl.methods.influence import PAIRS, VOCABULARIES

IDS = torch.tensor([7, 2, 7, 7, 2, 5, 7, 5])  # groups that are not adjacent; 5 has no correct row
CORRECT = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0]).bool()
VOCAB, DIM, WIDTH = 19, 5, 7


def batch(seed=0, dtype=torch.float64):
    """Holes, a row without tokens (the last correct one of group 7), a row of one token; NaN in masked cells."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(IDS), WIDTH, generator=g) < 0.7
    mask[6], mask[2] = False, torch.arange(WIDTH) == 3
    mask[:2, 1:3] = True
    hidden = torch.randn(len(IDS), WIDTH, DIM, generator=g, dtype=torch.float64)
    weight = torch.randn(VOCAB, DIM, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 12, mask.shape, generator=g)
    hidden[~mask], ids[~mask] = math.nan, -7
    return hidden.to(dtype), weight.to(dtype), ids, mask


def rows_of(mask):
    return [[t for t in range(mask.shape[1]) if mask[j, t]] for j in range(len(mask))]


def by_hand(hidden, logits, ids, mask, vocabulary="group", pairs="all", lengths=True):
    """sum over the tokens of the group's correct rows."""
    p, out, there = logits.softmax(-1), torch.zeros(mask.shape, dtype=torch.float64), rows_of(mask)
    for j in range(len(mask)):
        group = [i for i in range(len(mask)) if IDS[i] == IDS[j]]
        columns = sorted({int(ids[i, t]) for i in group for t in there[i]})
        columns = columns if vocabulary == "group" else range(VOCAB)
        for t in there[j]:
            for i in group:
                if not CORRECT[i] or (pairs == "others" and i == j):
                    continue
                for u in there[i]:
                    if pairs == "distinct" and (i, u) == (j, t):
                        continue
                    alpha = sum(
                        ((v == int(ids[j, t])) - float(p[j, t, v])) * ((v == int(ids[i, u])) - float(p[i, u, v]))
                        for v in columns
                    )
                    dot = sum(float(a) * float(b) for a, b in zip(hidden[j, t], hidden[i, u], strict=True))
                    out[j, t] += alpha * dot / (len(there[i]) if lengths else 1)
    return out


def sign_of(x):
    return torch.where(CORRECT[:, None], x, -x)


def packed(x, mask):
    """Rows of different lengths, with the holes before the last valid token."""
    ends = [max(there, default=-1) + 1 for there in rows_of(mask)]
    cu = torch.tensor([0, *itertools.accumulate(ends)])
    return torch.cat([x[j, :n] for j, n in enumerate(ends)]), cu


OPTIONS = list(itertools.product(VOCABULARIES, PAIRS))


@pytest.mark.parametrize("vocabulary, pairs", OPTIONS)
def test_it_is_the_double_sum(vocabulary, pairs):
    for seed in range(2):
        hidden, weight, ids, mask = batch(seed)
        how = {"vocabulary": vocabulary, "pairs": pairs}
        logits = hidden @ weight.t()
        expected = by_hand(hidden, logits, ids, mask, **how)
        assert (expected[mask] != 0).any()
        found = hr.thr(hidden, weight, ids, CORRECT, IDS, mask=mask, **how)
        near(found, sign_of(expected), "thr")
        again = hr.thr(hidden, None, ids, CORRECT, IDS, logits=logits, mask=mask, **how)
        near(again, sign_of(expected), "thr of logits")
        plain = hr.nthr(hidden, weight, ids, CORRECT, IDS, mask=mask, **how)
        near(plain, by_hand(hidden, logits, ids, mask, **how, lengths=False), "nthr")


def test_bias_and_views_of_logits():
    hidden, weight, ids, mask = batch()
    bias = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    logits = torch.full((len(IDS), WIDTH + 2, VOCAB), math.nan, dtype=torch.float64)
    logits[:, 1:-1] = hidden @ weight.t() + bias
    expected = sign_of(by_hand(hidden, logits[:, 1:-1], ids, mask))
    near(hr.thr(hidden, weight, ids, CORRECT, IDS, bias=bias, mask=mask), expected, "bias")
    near(hr.thr(hidden, None, ids, CORRECT, IDS, logits=logits[:, 1:-1], mask=mask), expected, "view")


@pytest.mark.parametrize("vocabulary, pairs", OPTIONS)
def test_small_tiles_packed_and_dtypes(vocabulary, pairs):
    hidden, weight, ids, mask = batch()
    how = {"vocabulary": vocabulary, "pairs": pairs}
    whole = hr.thr(hidden, weight, ids, CORRECT, IDS, mask=mask, **how)
    (flat, cu), (flat_ids, _), (flat_mask, _), (expected, _) = (packed(x, mask) for x in (hidden, ids, mask, whole))
    found = hr.thr(flat, weight, flat_ids, CORRECT, IDS, mask=flat_mask, cu_seqlens=cu, **how)
    near(found, expected, "packed")
    logits = hidden @ weight.t()
    for budget in (1 << 11, 1 << 13):
        small = hr.thr(hidden, None, ids, CORRECT, IDS, logits=logits, mask=mask, memory_budget=budget, **how)
        near(small, whole, f"{budget} bytes")
    for dtype, rtol in ((torch.float32, 1e-4), (torch.bfloat16, 1e-4)):
        rounded = hidden.to(dtype), weight.to(dtype)
        found = hr.thr(*rounded, ids, CORRECT, IDS, mask=mask, **how)
        exact = hr.thr(*(x.double() for x in rounded), ids, CORRECT, IDS, mask=mask, **how)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=rtol * float(exact.abs().max()))


def test_masked_cells_and_other_groups_do_not_matter():
    hidden, weight, ids, mask = batch()
    found = hr.thr(hidden, weight, ids, CORRECT, IDS, mask=mask)
    again = hr.thr(torch.where(mask[..., None], hidden, math.inf), weight, ids, CORRECT, IDS, mask=mask)
    near(again, found, "masked cells", 1e-12)  # the GEMMs are torch's, which promises no bits
    assert not found[~mask].any() and found[mask].isfinite().all()
    for group in (7, 2, 5):
        own = IDS == group
        alone = hr.thr(hidden[own], weight, ids[own], CORRECT[own], IDS[own], mask=mask[own])
        near(alone, found[own], "a group alone")
        assert (group == 5) == (not alone.any()), "5 has no correct row"


def test_its_parts_add_up():
    hidden, weight, ids, mask = batch()
    every, distinct, others = (hr.nthr(hidden, weight, ids, CORRECT, IDS, mask=mask, pairs=p) for p in PAIRS)
    wrong = mask & ~CORRECT[:, None]
    near(distinct[wrong], every[wrong], "wrong rows have no pair of their own")
    near(others[wrong], every[wrong], "nor a row")
    right = mask & CORRECT[:, None]
    assert (every[right] > distinct[right]).all(), "a token's pair with itself is positive"
    assert others[1].abs().max() < 1e-12 * every.abs().max(), "the only correct row of its group"
    parameter = torch.nn.Parameter(weight)
    assert not hr.thr(hidden.clone().requires_grad_(), parameter, ids, CORRECT, IDS, mask=mask).requires_grad


def test_threshold_and_advantages_of_thr():
    hidden, weight, ids, mask = batch()
    others = hr.thr(hidden, weight, ids, CORRECT, IDS, mask=mask, pairs="others")
    tau = hr.thr_threshold(others, CORRECT, IDS, mask=mask)
    for j in range(len(IDS)):
        cells = [
            float(others[i, t]) for i in range(len(IDS)) if IDS[i] == IDS[j] and CORRECT[i] for t in rows_of(mask)[i]
        ]
        near(tau[j], torch.tensor(sum(cells) / max(len(cells), 1), dtype=torch.float64), "tau")
    x = hr.thr(hidden, weight, ids, CORRECT, IDS, mask=mask)
    a = torch.linspace(-1.5, 2, len(IDS), dtype=torch.float64)
    threshold = tau + 0.5 * x[mask].abs().median()
    seen = set()
    for p in (0.1, -0.1):
        expected = torch.zeros_like(x)
        for j, there in enumerate(rows_of(mask)):
            for t in there:
                value = float(x[j, t])
                sign = (value > 0) - (value < 0)
                expected[j, t] = (abs(value) > float(threshold[j])) * (1 + sign * p) * float(a[j])
                seen.add((abs(value) > float(threshold[j]), sign))
        near(hr.thr_advantages(x, a, p=p, tau=threshold, mask=mask), expected, "advantages")
        per_token = torch.where(mask, a[:, None], math.nan)
        near(hr.thr_advantages(x, per_token, p=p, tau=threshold, mask=mask), expected, "of tokens")
        halves = [
            hr.thr_advantages(x[s], a[s], p=p, tau=threshold[s], mask=mask[s]) for s in (slice(3), slice(3, None))
        ]
        assert torch.equal(torch.cat(halves), hr.thr_advantages(x, a, p=p, tau=threshold, mask=mask))
    assert {(True, 1), (True, -1)} < seen and False in {kept for kept, _ in seen}
    assert not hr.thr_advantages(torch.zeros(1, 2), torch.ones(1), p=0.1, tau=0.0).any(), "the bound itself is dropped"


def test_statistics_and_advantages_of_nthr():
    mask = batch()[-1]
    s = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    s[~mask] = math.nan
    statistics = hr.nthr_statistics(s, CORRECT, IDS, beta=0.5, mask=mask)
    there, a = rows_of(mask), torch.linspace(-2, 2.5, len(IDS), dtype=torch.float64)
    expected, hits = torch.zeros(mask.shape, dtype=torch.float64), 0
    for j in range(len(IDS)):
        group = [i for i in range(len(IDS)) if IDS[i] == IDS[j]]
        means = [sum(float(s[i, t]) for t in there[i]) / len(there[i]) for i in group if CORRECT[i] and there[i]]
        tau = 0.5 * min(means) if means else math.inf
        eta = 2 * abs(0.5 - sum(bool(CORRECT[i]) for i in group) / len(group))
        near(statistics.tau[j], torch.tensor(tau, dtype=torch.float64), "tau")
        near(statistics.eta[j], torch.tensor(eta, dtype=torch.float64), "eta")
        for t in there[j]:
            hit = not CORRECT[j] and float(s[j, t]) > tau
            hits += hit
            expected[j, t] = float(a[j]) * (eta if hit else 1)
    assert 0 < hits < mask[~CORRECT].sum()
    found = hr.nthr_advantages(s, a, CORRECT, **statistics._asdict(), mask=mask)
    near(found, expected, "advantages")
    part = slice(2, 6)
    halves = hr.nthr_advantages(
        s[part], a[part], CORRECT[part], tau=statistics.tau[part], eta=statistics.eta[part], mask=mask[part]
    )
    assert torch.equal(halves, found[part])
    none = hr.nthr_statistics(s[:2], torch.zeros(2, dtype=torch.bool), IDS[:2], mask=mask[:2])
    assert none.tau.tolist() == [math.inf] * 2 and none.eta.tolist() == [1.0, 1.0]
    assert hr.nthr_statistics(s, CORRECT, IDS, beta=0.0, mask=mask).tau[IDS == 5].isinf().all()
    silent = hr.nthr_statistics(s, CORRECT, IDS, beta=0.5, eta=0.0, mask=mask)
    assert torch.equal(silent.tau, statistics.tau) and silent.eta.tolist() == [0.0] * len(IDS)
    dropped = hr.nthr_advantages(s, a, CORRECT, **silent._asdict(), mask=mask)
    near(dropped, torch.where(expected == a[:, None], expected, 0.0), "advantages of section 5.3")
    with pytest.raises(ValueError, match="^eta: got 'none', a str, accepted: a number, None for"):
        hr.nthr_statistics(s, CORRECT, IDS, eta="none", mask=mask)
    at_tau = hr.nthr_advantages(torch.zeros(1, 2), torch.ones(1), CORRECT[2:3], tau=0.0, eta=0.5)
    assert (at_tau == 1).all(), "the bound itself does not count"


@pytest.mark.parametrize("rows, width", [(0, 4), (3, 0), (3, 4)])
def test_batches_without_a_valid_token(rows, width):
    hidden, ids = torch.full((rows, width, DIM), math.nan), torch.full((rows, width), -7)
    correct, group, weight = torch.ones(rows).bool(), torch.arange(rows), torch.ones(VOCAB, DIM)
    mask = torch.zeros(rows, width).bool()
    x = hr.thr(hidden, weight, ids, correct, group, mask=mask)
    assert x.shape == (rows, width) and not x.any()
    assert not hr.thr_threshold(x, correct, group, mask=mask).any()
    a = torch.ones(rows)
    assert not hr.thr_advantages(x, a, p=0.1, tau=0.0, mask=mask).any()
    statistics = hr.nthr_statistics(x, correct, group, mask=mask)
    assert not hr.nthr_advantages(x, a, correct, **statistics._asdict(), mask=mask).any()


def call(**changed):
    hidden, weight, ids, mask = batch()
    given = {"hidden": hidden, "weight": weight, "ids": ids, "correct": CORRECT, "group_ids": IDS, "mask": mask}
    return hr.thr(**{**given, **changed})


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"vocabulary": "groups"}, "vocabulary: .*Did you mean 'group'"),
        ({"pairs": "other"}, "pairs: .*Did you mean 'others'"),
        ({"weight": None}, "logits: got None"),
        ({"logits": torch.zeros(8, 7, VOCAB)}, "logits: got a tensor, accepted: one of weight and logits"),
        ({"weight": None, "logits": torch.zeros(8, 6, VOCAB)}, r"logits: got shape \[8, 6, 19\]"),
        ({"hidden": torch.zeros(8, 7)}, r"hidden: got shape \[8, 7\]"),
        ({"hidden": torch.zeros(8, 7, 5, dtype=torch.int64)}, "hidden: got dtype torch.int64"),
        ({"ids": torch.zeros(8, 7)}, "ids: got dtype torch.float32"),
        ({"ids": torch.full((8, 7), VOCAB)}, "ids: got values"),
        ({"correct": CORRECT.long()}, "correct: got dtype torch.int64"),
        ({"correct": CORRECT[:3]}, r"correct: got shape \[3\]"),
        ({"group_ids": IDS[:3]}, r"group_ids: got \[3\]"),
        ({"memory_budget": 1}, "memory_budget: got 1 bytes"),
        ({"memory_budget": 0}, "memory_budget: got 0"),
    ],
)
def test_errors_name_the_argument(changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)


def test_errors_of_the_advantages():
    x, a, right = torch.zeros(2, 3), torch.zeros(2), torch.ones(2).bool()
    for changed, message in (
        ({"advantages": torch.zeros(3)}, r"advantages: got shape \[3\]"),
        ({"advantages": a.clone().requires_grad_()}, "advantages: got .*requires grad"),
        ({"tau": torch.zeros(3)}, r"tau: got shape \[3\]"),
        ({"p": math.nan}, "p: got nan"),
        ({"thr": x.clone().requires_grad_()}, "thr: got .*requires grad"),
    ):
        with pytest.raises(ValueError, match=message):
            hr.thr_advantages(**{"thr": x, "advantages": a, "p": 0.1, "tau": 0.0, **changed})
    with pytest.raises(ValueError, match=r"eta: got shape \[3\]"):
        hr.nthr_advantages(x, a, right, tau=0.0, eta=torch.zeros(3))
    with pytest.raises(ValueError, match="correct: got dtype"):
        hr.nthr_advantages(x, a, a, tau=0.0, eta=1.0)
