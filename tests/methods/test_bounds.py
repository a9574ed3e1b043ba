"""Bounds and entropy scores per token: official outputs (tests/golden), their formulas in loops, and their edges."""

import itertools
import math

import pytest
import torch
from cases import away_from_edges, backends_to_test, batch, run
from golden_data import INDEX, arrays, near

import tokenrl
from tokenrl import bounds
from tokenrl.instruments.parity import close
from tokenrl.methods.bandpo import KINDS
from tokenrl.methods.sspo import SCOPES

VALID = torch.tensor(
    [[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0]]
).bool()
IDS = torch.tensor([[7, 2, 2, 7, 2, 9], [2, 7, 7, 3, 3, 7], [2, 2, 2, 2, 2, 2], [3, 7, 7, 2, 7, 7], [0, 0, 2, 0, 0, 0]])
SPANS = torch.tensor(
    [[0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 2, 3], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
)
LENGTHS = [5, 6, 0, 6, 4]
ENDS = torch.tensor([0, 5, 11, 11, 17, 21])


def entropies(seed=0, garbage=math.nan, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.where(VALID, torch.randn(VALID.shape, generator=generator, dtype=dtype).exp(), garbage)


def packed(x):
    return torch.cat([x[row, :n] for row, n in enumerate(LENGTHS)])


def loop_segments(delimiters):
    out = torch.zeros_like(IDS)
    for row in range(len(VALID)):
        number = 0
        for t in range(VALID.shape[1]):
            if VALID[row, t]:
                out[row, t] = number
                number += int(IDS[row, t]) in delimiters
    return out


def test_segments_are_their_loop():
    assert torch.equal(loop_segments({2, 3}), SPANS)
    for delimiters in ([2], {2, 3}, (9,), [], torch.tensor([7, 2], dtype=torch.int32)):
        found = bounds.segment_ids(IDS, delimiters, mask=VALID)
        marks = delimiters.tolist() if isinstance(delimiters, torch.Tensor) else delimiters
        assert found.dtype == torch.int64 and torch.equal(found, loop_segments(marks))
        flat = bounds.segment_ids(packed(IDS).int(), delimiters, mask=packed(VALID), cu_seqlens=ENDS)
        assert torch.equal(flat, packed(found))
    assert bounds.segment_ids(torch.tensor([[5, 5, 5]]), [5]).tolist() == [[0, 1, 2]]


def loop_bounds(entropy, scope, eps, low_factor, high_factor):
    means = {}
    for row in range(len(VALID)):
        for span in SPANS[row, VALID[row]].unique().tolist():
            x = entropy[row, VALID[row] & (SPANS[row] == span)].tolist()
            means[row, span] = sum(x) / len(x)
    out = torch.zeros(VALID.shape, dtype=torch.float64)
    for row, t in VALID.nonzero().tolist():
        near_by = [m for (of, _), m in means.items() if scope == "batch" or of == row]
        least, most = min(near_by), max(near_by)
        h = (means[row, int(SPANS[row, t])] - least) / (most - least) if most > least else 0.5
        out[row, t] = eps * (low_factor + (high_factor - low_factor) * h)
    return out


@pytest.mark.parametrize("scope", SCOPES)
def test_entropy_bounds_are_their_formula(scope):
    for seed, (low_factor, high_factor) in itertools.product(range(4), ((0.5, 1.5), (0.0, 3.0), (1.0, 1.0))):
        entropy = entropies(seed)
        options = {"eps_low": 0.1, "eps_high": 0.3, "low_factor": low_factor, "high_factor": high_factor}
        found = bounds.entropy_bounds(entropy, SPANS, scope=scope, mask=VALID, **options)
        for x, eps in zip(found, (0.1, 0.3), strict=True):
            near(x, loop_bounds(entropy, scope, eps, low_factor, high_factor), scope)
            assert not x[~VALID].any()
        flat = bounds.entropy_bounds(
            packed(entropy), packed(SPANS), scope=scope, mask=packed(VALID), cu_seqlens=ENDS, **options
        )
        for x, y in zip(flat, found, strict=True):
            near(x, packed(y), "packed")


def test_equal_spans_get_the_middle_whatever_the_rounding():
    entropy, spans = torch.full((1, 13), 0.1), torch.tensor([[0] * 3 + [1] * 7 + [2] * 3])
    low, high = bounds.entropy_bounds(entropy, spans, eps_low=0.2, eps_high=0.4, low_factor=0.5, high_factor=2.5)
    assert low.dtype == torch.float32
    assert torch.equal(low, torch.full_like(low, 0.3)) and torch.equal(high, torch.full_like(high, 0.6))
    rounded = 0.3 + 5e-9 * (spans == 1).double()
    assert (bounds.entropy_bounds(rounded, spans, eps_low=0.2, eps_high=0.4)[0] == 0.2).all()
    entropy[0, 4] += 1e-3
    assert bounds.entropy_bounds(entropy, spans, eps_low=0.2, eps_high=0.4)[0].unique().numel() == 2
    outside = bounds.entropy_bounds(entropy, spans, eps_low=1.0, eps_high=1.0, scope="batch", lowest=1.0, highest=2.0)
    assert torch.equal(outside[0], torch.full_like(low, 0.5)), "h stays in [0, 1]"


@pytest.mark.parametrize("case", [f"entropy_h.{i}" for i in range(4)])
def test_golden_hapo_score(case):
    x, config = arrays("hapo", case), INDEX["hapo"]["cases"][case]["config"]
    given = {"quantile": config["entropy_pivot"], "mask": x["mask"]}
    statistics = bounds.hapo_statistics(x["entropy"], **given)
    near(statistics.pivot, x["pivot"], "pivot")
    near(statistics.std, x["std"], "std")
    near(bounds.hapo_score(x["entropy"], **given), x["h_signed"], "h")
    near(bounds.hapo_score(x["entropy"], compat_sign_bug=True, **given), x["h_hat"], "published h")


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_hapo_score_is_its_formula(quantile):
    for seed in range(4):
        entropy = entropies(seed)
        entropy[1, 1] = 0.0
        x = {tuple(at): math.log(max(float(entropy[tuple(at)]), 1e-8)) for at in VALID.nonzero().tolist()}
        pivot = sorted(x.values())[round(quantile * (len(x) - 1))]
        std = math.sqrt(sum((v - pivot) ** 2 for v in x.values()) / len(x))
        z = {at: (v - pivot) / std for at, v in x.items()}
        expected = torch.zeros(VALID.shape, dtype=torch.float64)
        for at, v in z.items():
            expected[at] = v / max(z.values()) if v > 0 else v / max(-min(z.values()), 1e-8)
        found = bounds.hapo_score(entropy, quantile=quantile, mask=VALID)
        near(found, expected, "h")
        assert found.abs().max() == 1 and found.isfinite().all()
        flat = bounds.hapo_score(packed(entropy), quantile=quantile, mask=packed(VALID), cu_seqlens=ENDS)
        near(flat, packed(found), "packed")


def test_equal_entropies_score_zero_and_other_statistics_are_capped():
    assert not bounds.hapo_score(torch.full((2, 3), 0.7)).any()
    entropy = torch.tensor([[0.1, 1.0, 10.0]])
    narrow = bounds.hapo_statistics(torch.tensor([[0.9, 1.0, 1.1]]), quantile=0.5)
    assert bounds.hapo_score(entropy, statistics=narrow).tolist() == [[-1.0, 0.0, 1.0]]


def every_result(entropy, mask, spans, ids, statistics, least, most):
    for kind in KINDS:
        yield from bounds.bandpo(-entropy, kind=kind, mask=mask)
    yield bounds.segment_ids(ids, [2, 3], mask=mask)
    options = {"eps_low": 0.1, "eps_high": 0.3, "mask": mask}
    yield from bounds.entropy_bounds(entropy, spans, **options)
    yield from bounds.entropy_bounds(entropy, spans, scope="batch", lowest=least, highest=most, **options)
    yield bounds.hapo_score(entropy, mask=mask, statistics=statistics)


def test_a_split_batch_is_the_same_and_masked_cells_do_not_matter():
    entropy, parts = entropies(), (slice(1), slice(1, 3), slice(3, 5))
    ranges = [bounds.entropy_range(entropy[p], SPANS[p], mask=VALID[p]) for p in parts]
    least, most = min(x for x, _ in ranges), max(x for _, x in ranges)
    given = bounds.hapo_statistics(entropy, mask=VALID), float(least), most
    whole = list(every_result(entropy, VALID, SPANS, IDS, *given))
    halves = zip(*(every_result(entropy[p], VALID[p], SPANS[p], IDS[p], *given) for p in parts), strict=True)
    for expected, found in zip(whole, halves, strict=True):
        near(torch.cat(found), expected, "parts", 1e-12)  # sums are torch's, which promises no bits
        assert not expected[~VALID].any()
    own = bounds.entropy_bounds(entropy, SPANS, eps_low=0.1, eps_high=0.3, mask=VALID, scope="batch")
    for found, expected in zip((*own, bounds.hapo_score(entropy, mask=VALID)), whole[-3:], strict=True):
        near(found, expected, "of the whole batch", 1e-12)
    for garbage in (math.inf, -math.inf, 3.0):
        other = entropies(garbage=garbage)
        junk = [torch.where(VALID, x, 2) for x in (SPANS, IDS)]
        for found, expected in zip(every_result(other, VALID, *junk, *given), whole, strict=True):
            near(found, expected, "masked cells", 1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3)])
def test_batches_without_a_valid_token(shape):
    entropy, mask = torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool)
    ids = torch.zeros(shape, dtype=torch.int64)
    ends = bounds.entropy_range(entropy, ids, mask=mask)
    assert [float(x) for x in ends] == [math.inf, -math.inf]
    statistics = bounds.hapo_statistics(entropy, mask=mask)
    for result in every_result(entropy, mask, ids, ids, statistics, *ends):
        assert result.shape == shape and not result.any()
    assert not bounds.hapo_score(entropy, mask=mask).any()


@pytest.mark.parametrize("backend", backends_to_test())
def test_spans_of_all_or_one_token_are_gspo_token_and_grpo(backend):
    """SSPO between its two ends, with bounds per token."""
    generator = torch.Generator().manual_seed(5)
    low, high = 0.1 + 0.2 * torch.rand(2, 5, 19, generator=generator, dtype=torch.float64)
    for name, same, spans in (
        ("gspo_token", tokenrl.objective("gspo_token", eps_low=low, eps_high=high), torch.zeros(5, 19)),
        ("grpo", tokenrl.objective("grpo", eps_low=low, eps_high=high), torch.arange(19.0).expand(5, 19)),
    ):
        case = away_from_edges(same, batch)
        del case["segment_ids"]
        for row in ("gspo_token", "sspo"):
            row = tokenrl.objective(row, eps_low=low, eps_high=high)
            found = run(row, case | {"segment_ids": spans.long()}, backend, torch.float64)
            expected = run(same, case, "reference", torch.float64)
            for x, y, what in zip(found[:2], expected[:2], ("loss", "gradient"), strict=True):
                near(x, y, f"{name} {what}")
            assert expected[1].count_nonzero() > 10


@pytest.mark.parametrize("backend", backends_to_test())
def test_sspo_and_bandpo_run_with_their_bounds(backend):
    case = batch(3)
    mask, ids = case["mask"], torch.randint(0, 5, (5, 19), generator=torch.Generator().manual_seed(1))
    case["segment_ids"] = bounds.segment_ids(ids, [0, 1], mask=mask)
    sspo = bounds.entropy_bounds(-case["old_logp"], case["segment_ids"], eps_low=0.05, eps_high=0.1, mask=mask)
    band = bounds.bandpo(case["old_logp"], kind="kl", mask=mask)
    for name, (low, high) in (("sspo", sspo), ("ppo", band)):
        row = tokenrl.objective(name, eps_low=low, eps_high=high)
        given = case if name == "sspo" else {k: v for k, v in case.items() if k != "segment_ids"}
        truth, found = (run(row, given, b, torch.float64) for b in ("reference", backend))
        for x, y in zip(found[:2], truth[:2], strict=True):
            close(x, y, y, what=name)
            assert y.isfinite().all() and y.any()


X, N = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64)
EPS = {"eps_low": 0.1, "eps_high": 0.1}
ERRORS = [
    (lambda: bounds.bandpo(X, kind="k1"), "kind: got 'k1', accepted: tv, chi2, kl"),
    (lambda: bounds.bandpo(X, delta=0.0), "delta: got 0.0, accepted: a positive number"),
    (lambda: bounds.bandpo(X, eps_low=1.5), r"eps_low: got 1.5, accepted: a number in \[0, 1\]"),
    (lambda: bounds.bandpo(X, ceiling=0.5), "ceiling: got 0.5, accepted: a number, at least 1"),
    (lambda: bounds.bandpo(X.clone().requires_grad_()), "old_logp: got a tensor that requires grad"),
    (lambda: bounds.bandpo(X.half()), "old_logp: got dtype torch.float16"),
    (lambda: bounds.bandpo(X[0]), r"old_logp: got shape \[3\] without cu_seqlens"),
    (lambda: bounds.segment_ids(X, [1]), "ids: got dtype torch.float32"),
    (lambda: bounds.segment_ids(N, [0.5]), "delimiters: got dtype torch.float32"),
    (lambda: bounds.segment_ids(N, [1], mask=N), "mask: got dtype torch.int64"),
    (lambda: bounds.entropy_bounds(X, X, **EPS), "segment_ids: got dtype torch.float32"),
    (lambda: bounds.entropy_bounds(X, N[:1], **EPS), r"segment_ids: got shape \[1, 3\]"),
    (lambda: bounds.entropy_bounds(X, N, eps_low=-0.1, eps_high=0.1), "eps_low: got -0.1"),
    (lambda: bounds.entropy_bounds(X, N, high_factor=0.1, **EPS), "high_factor: got 0.1, accepted: .*at least 0.5"),
    (lambda: bounds.entropy_bounds(X, N, scope="row", **EPS), "scope: got 'row', accepted: sequence, batch"),
    (lambda: bounds.entropy_bounds(X, N, lowest=0.1, **EPS), "highest: got None, accepted: both"),
    (lambda: bounds.entropy_bounds(X, N, lowest=0.1, highest=1, **EPS), "lowest: got 0.1, accepted: None for scope"),
    (lambda: bounds.entropy_bounds(X, N, scope="batch", lowest=X, highest=1, **EPS), "lowest: got a tensor of shape"),
    (lambda: bounds.hapo_score(X, quantile=1.1), r"quantile: got 1.1, accepted: a number in \[0, 1\]"),
    (lambda: bounds.hapo_score(X, statistics=(X, X, X, X)), r"statistics.pivot: got a tensor of shape \[2, 3\]"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
