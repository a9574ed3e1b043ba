"""Rollout corrections against verl's outputs (tests/golden), against their formulas in loops, and their edges."""

import itertools
import math

import pytest
import torch
from golden_data import INDEX, arrays, near

import tokenrl
from tokenrl import corrections as cor

FAMILY = "verl_rollout_correction"
VALID = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1]]).bool()
SEGMENTS = torch.tensor([[3, 3, 9, 3, 4, 0], [1, 1, 2, 2, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 7, 1, 5]])
RUNS = [[[0, 1, 3], [4]], [[0, 1], [2, 3], [4, 5]], [], [[1, 2, 4], [5]]]  # what SEGMENTS means


def batch(seed=0, scale=0.6, garbage=math.nan):
    generator = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(VALID.shape, generator=generator, dtype=torch.float64) * 3
    logp = rollout + scale * torch.randn(VALID.shape, generator=generator, dtype=torch.float64)
    return torch.where(VALID, logp, garbage), torch.where(VALID, rollout, garbage)


def loop_spans(kind):
    """[(row, columns)]: the tokens that share a weight."""
    columns = [[t for t in range(VALID.shape[1]) if VALID[row, t]] for row in range(len(VALID))]
    if kind == "token":
        return [(row, [t]) for row, there in enumerate(columns) for t in there]
    if kind == "sequence":
        return [(row, there) for row, there in enumerate(columns) if there]
    return [(row, run) for row, runs in enumerate(RUNS) for run in runs]


def loop_weights(logp, rollout, level, bound, low, high, clamp, normalize):
    spans = loop_spans({"geometric": "sequence"}.get(level, level))
    weights = []
    for row, there in spans:
        s = sum(float(logp[row, t] - rollout[row, t]) for t in there)
        if level in ("geometric", "segment"):
            s /= len(there)
        w = math.exp(s if clamp is None else min(max(s, -clamp), clamp))
        if bound == "truncate":
            w = max(min(w, high), low or 0.0)
        elif bound == "mask" and not (low or 0.0) <= w <= (math.inf if high is None else high):
            w = 0.0
        weights.append(w)
    mean = (sum(weights) / len(weights) if normalize == "batch" else 1.0) or 1.0
    out = torch.zeros(VALID.shape, dtype=torch.float64)
    for (row, there), w in zip(spans, weights, strict=True):
        for t in there:
            out[row, t] = w / mean
    return out


def loop_rejection(logp, rollout, statistic, low, high):
    terms = {"k1": lambda x: -x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(x) - 1 - x}
    take = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max}
    *level, k = statistic.split("_")
    out = torch.zeros(VALID.shape, dtype=torch.bool)
    for row, there in loop_spans("token" if level == ["token"] else "sequence"):
        x = [min(max(float(logp[row, t] - rollout[row, t]), -20.0), 20.0) for t in there]
        found = take[level[1] if len(level) > 1 else "sum"]([terms[k](v) for v in x])
        kept = (low or 0) <= math.exp(found) <= high if k == "k1" else found <= high
        for t in there:
            out[row, t] = kept
    return out


def packed(x, lengths):
    return torch.cat([x[row, :n] for row, n in enumerate(lengths)])


def golden_range(text):
    """verl's threshold: a number, or "low_high"."""
    ends = [float(part) for part in str(text).split("_")]
    return (ends[0], ends[1]) if len(ends) == 2 else (None, ends[0])


# Read when tests run, so that a missing entry fails them and not their collection.
@pytest.mark.parametrize("case", [f"weights.{i}" for i in range(6)])
def test_golden_weights(case):
    x, config = arrays(FAMILY, case), INDEX[FAMILY]["cases"][case]["config"]
    low, high = golden_range(config["rollout_is_threshold"])
    weights = cor.importance_weights(
        x["old_logp"], x["rollout_logp"], mask=x["mask"], level=config["rollout_is"], low=low, high=high,
        bound="truncate" if low is None else "mask",
        normalize="batch" if config["rollout_is_batch_normalize"] else "none",
    )  # fmt: skip
    near(weights, x["weights"], case)


@pytest.mark.parametrize("case", [f"reject.{i}" for i in range(8)])
def test_golden_rejection(case):
    x, config = arrays(FAMILY, case), INDEX[FAMILY]["cases"][case]["config"]
    kept = x["mask"]
    criteria = config["rollout_rs"].split(","), config["rollout_rs_threshold"].split(",")
    for statistic, threshold in zip(*criteria, strict=True):
        low, high = golden_range(threshold)
        kept = kept & cor.rejection_mask(
            x["old_logp"], x["rollout_logp"], statistic=statistic, low=low, high=high, mask=x["mask"]
        )
    assert torch.equal(kept, x["keep_mask"]), case
    assert kept.any() and (x["mask"] & ~kept).any(), "a case that keeps or drops all tests nothing"


BOUNDS = (
    ("truncate", None, 1.3), ("truncate", 0.8, 1.3), ("mask", 0.7, 1.6), ("mask", None, 1.3), ("mask", 0.9, None),
    ("none", None, None),
)  # fmt: skip


@pytest.mark.parametrize("level", cor.LEVELS)
@pytest.mark.parametrize("bound, low, high", BOUNDS)
@pytest.mark.parametrize("normalize", cor.NORMALIZATIONS)
def test_weights_are_their_formula(level, bound, low, high, normalize):
    logp, rollout = batch()
    segments = {"segment_ids": SEGMENTS} if level == "segment" else {}
    for clamp in (20.0, 0.2, None):
        weights = cor.importance_weights(
            logp, rollout, mask=VALID, level=level, bound=bound, low=low, high=high, clamp=clamp, normalize=normalize,
            **segments,
        )  # fmt: skip
        near(weights, loop_weights(logp, rollout, level, bound, low, high, clamp, normalize), f"{level} {clamp}")
        assert (weights[~VALID] == 0).all() and not weights.requires_grad


@pytest.mark.parametrize("statistic", cor.REJECTIONS)
def test_rejection_is_its_formula(statistic):
    seen = set()
    for seed, high, scale in itertools.product(range(4), (0.2, 0.8, 1.3), (0.6, 30.0)):
        logp, rollout = batch(seed, scale)
        low = 0.4 * high if statistic.endswith("k1") else None
        kept = cor.rejection_mask(logp, rollout, statistic=statistic, low=low, high=high, mask=VALID)
        assert torch.equal(kept, loop_rejection(logp, rollout, statistic, low, high))
        seen |= set(kept[VALID].tolist())
    assert seen == {False, True}


def test_both_ends_are_kept_and_k1_is_the_inverse_ratio():
    logp = torch.tensor([[0.0, 0.5, -0.5]], dtype=torch.float64)
    half = cor.rejection_mask(logp, torch.zeros_like(logp), statistic="token_k1", low=math.exp(-0.5), high=1.0)
    assert half.tolist() == [[True, True, False]], "rollout / train is 1, e^-0.5, e^0.5"
    equal = cor.rejection_mask(logp, torch.zeros_like(logp), statistic="token_k2", high=0.125)
    assert equal.all()
    weights = cor.importance_weights(logp, torch.zeros_like(logp), bound="mask", low=1.0, high=math.exp(0.5))
    assert (weights > 0).tolist() == [[True, True, False]]


def test_one_end_may_be_open():
    logp, rollout = batch()
    for low, high in ((None, 1.1), (0.9, None), (0.0, 1.1)):
        kept = cor.rejection_mask(logp, rollout, statistic="seq_mean_k1", low=low, high=high, mask=VALID)
        assert torch.equal(kept, loop_rejection(logp, rollout, "seq_mean_k1", low, math.inf if high is None else high))


def test_seq_mask_tis_is_two_calls():
    logp, rollout = batch()
    low, high = 0.9, 1.2
    inside = cor.rejection_mask(logp, rollout, statistic="seq_mean_k1", low=1 / high, high=1 / low, mask=VALID)
    found = cor.importance_weights(logp, rollout, mask=VALID, bound="none") * inside
    expected, kept = torch.zeros_like(found), []
    for row, there in loop_spans("sequence"):
        q = [float(logp[row, t] - rollout[row, t]) for t in there]
        kept.append(low <= math.exp(sum(q) / len(q)) <= high)
        for t, x in zip(there, q, strict=True):
            expected[row, t] = math.exp(x) * kept[-1]
    near(found, expected, "seq-mask-tis")
    assert set(kept) == {False, True}


def test_off_policy_rows_are_their_formula():
    logp, rollout = batch()
    seen = set()
    for signs, threshold in itertools.product(itertools.product((-1.0, 0.0, 1.0), repeat=4), (-0.3, 0.0, 0.2)):
        advantages = torch.tensor(signs, dtype=torch.float64)
        expected = VALID.clone()
        for row, there in loop_spans("sequence"):
            mean = sum(float(rollout[row, t] - logp[row, t]) for t in there) / len(there)
            if signs[row] < 0 and mean > threshold:
                expected[row] = False
        kept = cor.off_policy_sequence_mask(logp, rollout, advantages, threshold=threshold, mask=VALID)
        assert torch.equal(kept, expected)
        per_token = torch.where(VALID, advantages[:, None], math.nan)
        again = cor.off_policy_sequence_mask(logp, rollout, per_token, threshold=threshold, mask=VALID)
        assert torch.equal(again, expected)
        seen |= set(kept[VALID].tolist())
    assert seen == {False, True}


def test_per_token_advantages_drop_their_own_tokens():
    logp, rollout = torch.full((1, 3), -1.0), torch.zeros(1, 3)
    advantages = torch.tensor([[1.0, -1.0, 0.0]])
    kept = cor.off_policy_sequence_mask(logp, rollout, advantages, threshold=0.5)
    assert kept.tolist() == [[True, False, True]]


@pytest.mark.parametrize("quantile", [0.01, 0.2, 0.3, 0.5, 0.7, 0.77, 1.0])
def test_entropy_threshold_is_the_quantile(quantile):
    for seed, dtype in itertools.product(range(5), (torch.float32, torch.float64)):
        entropy = torch.where(VALID, batch(seed)[0].exp(), math.nan).to(dtype)
        found = cor.entropy_threshold(entropy, quantile, VALID)
        values = sorted(entropy[VALID].double().tolist())
        place = (1 - quantile) * (len(values) - 1)
        below = math.floor(place + 1e-9)
        above = values[min(below + 1, len(values) - 1)]
        expected = values[below] + max(place - below, 0) * (above - values[below])
        near(found, torch.tensor(expected, dtype=torch.float64), "threshold")
        near(found, torch.quantile(entropy[VALID].double(), 1 - quantile), "torch.quantile")
        kept = cor.top_entropy_mask(entropy, quantile=quantile, mask=VALID)
        # As many as lie at or above the place, whatever the rounding of 1 - quantile.
        assert kept[~VALID].logical_not().all()
        assert kept.sum() == len(values) - math.ceil(place - 1e-9)


def test_ties_are_kept_and_quantile_one_keeps_all():
    entropy = torch.tensor([[0.1, 2.0, 2.0, 2.0, 0.3]])
    assert cor.top_entropy_mask(entropy).tolist() == [[False, True, True, True, False]]
    assert cor.top_entropy_mask(entropy, quantile=1.0).all()
    steps = torch.arange(11.0)[None]
    assert cor.top_entropy_mask(steps, quantile=0.7).sum() == 8, "1 - 0.7 is a little more than 0.3"


def test_packed_equals_padded():
    lengths, rows = [5, 6, 0, 6], torch.tensor([-1.0, 1.0, 1.0, -1.0])
    ends = torch.tensor([0, 5, 11, 11, 17])
    logp, rollout = batch()
    flat = [packed(x, lengths) for x in (logp, rollout, VALID, SEGMENTS)]
    given = {"mask": flat[2], "cu_seqlens": ends}
    for level, normalize in itertools.product(cor.LEVELS, cor.NORMALIZATIONS):
        options = {"level": level, "bound": "mask", "low": 0.6, "high": 1.7, "normalize": normalize}
        ids, flat_ids = ({"segment_ids": x} if level == "segment" else {} for x in (SEGMENTS, flat[3]))
        padded = cor.importance_weights(logp, rollout, mask=VALID, **options, **ids)
        near(cor.importance_weights(*flat[:2], **given, **options, **flat_ids), packed(padded, lengths), level)
    for statistic in cor.REJECTIONS:
        padded = cor.rejection_mask(logp, rollout, statistic=statistic, high=0.8, mask=VALID)
        kept = cor.rejection_mask(*flat[:2], statistic=statistic, high=0.8, **given)
        assert torch.equal(kept, packed(padded, lengths))
    padded = cor.off_policy_sequence_mask(logp, rollout, rows, threshold=-0.1, mask=VALID)
    kept = cor.off_policy_sequence_mask(*flat[:2], rows, threshold=-0.1, **given)
    assert torch.equal(kept, packed(padded, lengths))
    padded = cor.top_entropy_mask(rollout, mask=VALID)
    assert torch.equal(cor.top_entropy_mask(flat[1], **given), packed(padded, lengths))


def every_result(logp, rollout, mask, segments, threshold):
    """All of the module but what looks beyond a row."""
    rows = torch.ones(len(logp), dtype=logp.dtype).neg()
    for level in cor.LEVELS:
        ids = {"segment_ids": segments} if level == "segment" else {}
        yield cor.importance_weights(logp, rollout, mask=mask, level=level, high=1.4, **ids)
    for statistic in cor.REJECTIONS:
        yield cor.rejection_mask(logp, rollout, statistic=statistic, high=0.9, mask=mask)
    yield cor.off_policy_sequence_mask(logp, rollout, rows, threshold=0.0, mask=mask)
    yield cor.top_entropy_mask(rollout, threshold=threshold, mask=mask)


def test_a_split_batch_is_the_same_and_masked_cells_do_not_matter():
    logp, rollout = batch()
    threshold = cor.entropy_threshold(rollout, 0.2, VALID)
    whole = list(every_result(logp, rollout, VALID, SEGMENTS, threshold))
    parts = zip(
        *(every_result(logp[p], rollout[p], VALID[p], SEGMENTS[p], threshold) for p in (slice(1), slice(1, 4))),
        strict=True,
    )
    for expected, halves in zip(whole, parts, strict=True):
        assert torch.equal(torch.cat(halves), expected)
    assert torch.equal(cor.top_entropy_mask(rollout, mask=VALID), whole[-1])
    assert torch.equal(cor.top_entropy_mask(rollout, threshold=float(threshold), mask=VALID), whole[-1])
    for garbage in (math.inf, -math.inf, 3.0):
        results = every_result(*batch(garbage=garbage), VALID, SEGMENTS, threshold)
        for found, expected in zip(results, whole, strict=True):
            assert torch.equal(found, expected)
    normalized = [
        cor.importance_weights(logp[p], rollout[p], mask=VALID[p], bound="none", normalize="batch")
        for p in (slice(4), slice(1), slice(1, 4))
    ]
    assert not torch.allclose(normalized[0], torch.cat(normalized[1:])), "the one that may differ"


def test_identical_policies_weigh_one_and_keep_all():
    logp, _ = batch()
    for level, normalize in itertools.product(cor.LEVELS, cor.NORMALIZATIONS):
        ids = {"segment_ids": SEGMENTS} if level == "segment" else {}
        weights = cor.importance_weights(logp, logp, mask=VALID, level=level, high=2.0, normalize=normalize, **ids)
        assert torch.equal(weights, VALID.double())
    for statistic in cor.REJECTIONS:
        assert torch.equal(cor.rejection_mask(logp, logp, statistic=statistic, high=1.0, mask=VALID), VALID)
    kept = cor.off_policy_sequence_mask(logp, logp, torch.full((4,), -1.0), threshold=0.0, mask=VALID)
    assert torch.equal(kept, VALID)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3)])
def test_batches_without_a_valid_token(shape):
    logp, mask = torch.full(shape, math.nan), torch.zeros(shape, dtype=torch.bool)
    ids = torch.zeros(shape, dtype=torch.int64)
    for result in every_result(logp, logp, mask, ids, 0.1):
        assert result.shape == shape and not result.any()
    for level in ("token", "sequence"):
        assert not cor.importance_weights(logp, logp, mask=mask, level=level, high=1.0, normalize="batch").any()
    assert cor.entropy_threshold(logp, 0.2, mask) == math.inf
    assert not cor.top_entropy_mask(logp, mask=mask).any()


def test_a_mean_of_zero_divides_nothing_and_nan_shows():
    logp, rollout = torch.zeros(1, 3), torch.tensor([[0.0, math.nan, 0.0]])
    none = cor.importance_weights(logp, logp, bound="mask", low=2.0, normalize="batch")
    assert none.dtype == torch.float32 and torch.equal(none, torch.zeros(1, 3))
    for options in ({"high": 1.0}, {"bound": "mask", "high": 2.0}, {"bound": "none"}):
        assert cor.importance_weights(logp, rollout, **options).isnan().tolist() == [[False, True, False]]
    kept = cor.rejection_mask(logp, rollout, statistic="token_k2", high=1.0)
    assert kept.tolist() == [[True, False, True]]


def test_as_token_weight_it_multiplies_loss_and_gradient():
    logp, rollout = batch(garbage=0.0)
    old, advantages = rollout + 0.1, torch.tensor([1.0, -1.0, 1.0, -0.5], dtype=torch.float64)
    weights = cor.importance_weights(old, rollout, mask=VALID, level="token", high=1.05)
    weights = weights * cor.importance_weights(logp, rollout, mask=VALID, level="sequence", bound="mask", high=1.5)
    weights = weights * cor.top_entropy_mask(-rollout, quantile=0.6, mask=VALID)

    def gradient(weight, mask):
        leaf = logp.clone().requires_grad_()
        loss, _ = tokenrl.policy_loss(
            "grpo", leaf, old, advantages, mask=mask, token_weight=weight, aggregation="token-sum", backend="reference"
        )
        loss.backward()
        return loss.detach(), leaf.grad

    loss, grad = gradient(weights, VALID)
    _, plain = gradient(None, VALID)
    near(grad, plain * weights, "gradient")
    expected = torch.zeros((), dtype=torch.float64)
    for row, t in VALID.nonzero().tolist():
        one = torch.zeros_like(VALID)
        one[row, t] = True
        expected += weights[row, t] * gradient(None, one)[0]
    near(loss, expected, "loss")
    assert 0 < (weights[VALID] == 0).sum() < VALID.sum()
