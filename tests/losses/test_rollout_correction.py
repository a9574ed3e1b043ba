"""Weights and masks of the rollout correction together: layouts, splits, edges, and their place in the loss."""

import itertools
import math

import pytest
import torch
from cases import backends_to_test, device_of
from golden_data import near
from rollout_cases import SEGMENTS, VALID, batch

import tokenrl
from tokenrl import corrections as cor


def packed(x, lengths):
    return torch.cat([x[row, :n] for row, n in enumerate(lengths)])


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
    logp, rollout = torch.tensor([[0.0, math.nan, 0.0]]), torch.zeros(1, 3)
    none = cor.importance_weights(rollout, rollout, bound="mask", low=2.0, normalize="batch")
    assert none.dtype == torch.float32 and torch.equal(none, torch.zeros(1, 3))
    for options in ({"high": 1.0}, {"bound": "mask", "high": 2.0}, {"bound": "none"}):
        assert cor.importance_weights(logp, rollout, **options).isnan().tolist() == [[False, True, False]]
    kept = cor.rejection_mask(logp, rollout, statistic="token_k2", high=1.0)
    assert kept.tolist() == [[True, False, True]]


@pytest.mark.parametrize("backend", backends_to_test())
def test_vespo_takes_the_weights_into_its_ratio(backend):
    """log r = sum of d + log w over the row's tokens, clamped to +-20; d to +-20 before."""
    logp, rollout = (x.to(device_of(backend)) for x in batch(garbage=0.0))
    old, advantages = rollout + 0.1, torch.tensor([1.0, -1.0, 1.0, -0.5], dtype=torch.float64).to(logp.device)
    old[1], old[3] = logp[1] - 15, logp[3] + 15
    mask = VALID.to(logp.device)
    options = {"bound": "truncate", "low": 0.9, "high": 1.05}
    w = torch.where(mask, cor.importance_weights(old, rollout, mask=mask, **options), 1)
    s = (torch.where(mask, logp - old, 0) + w.log()).sum(1).clamp(-20, 20)
    assert (s.abs() == 20).sum() == 2
    positive = advantages > 0
    k, decay = torch.where(positive, 2.0, 3.0), torch.where(positive, 3.0, 2.0)
    phi = torch.exp(decay + k * s - decay * s.exp())
    expected = torch.where(mask, -(phi * advantages)[:, None] / mask.sum(), 0)
    leaf = logp.clone().requires_grad_()
    how = {"mask": mask, "rollout_logp": rollout, "correction": options, "backend": backend}
    loss, _ = tokenrl.policy_loss("vespo", leaf, old, advantages, **how)
    near(loss.detach(), (expected * logp).sum(), "loss")
    near(torch.autograd.grad(loss, leaf)[0], expected, "gradient")
    weight = torch.full_like(logp, 0.5)  # other weights are factors of the loss
    halved, _ = tokenrl.policy_loss("vespo", leaf, old, advantages, token_weight=weight, **how)
    near(halved.detach(), loss.detach() / 2, "loss under a weight")
    with pytest.raises(ValueError, match="^correction: got level 'sequence', accepted: 'token'"):
        tokenrl.policy_loss("vespo", leaf, old, advantages, **how | {"correction": {"level": "sequence", "high": 2.0}})


def test_vespo_from_hidden_states_takes_them_into_its_ratio():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, generator=g), torch.randn(11, 8, generator=g)
    ids, a = torch.randint(0, 11, (2, 5), generator=g), torch.tensor([1.0, -1.0])
    logp, _ = tokenrl.linear_token_logprobs(hidden, weight, ids)
    rollout = logp - 0.2 * torch.randn(2, 5, generator=g)
    old = logp - 0.1 * torch.randn(2, 5, generator=g)
    expected, _ = tokenrl.policy_loss("vespo", logp, old, a, rollout_logp=rollout)
    found, metrics = tokenrl.linear_policy_loss("vespo", hidden, weight, ids, old, a, rollout_logp=rollout)
    near(found, expected, "loss")
    assert metrics.passes == 1


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
