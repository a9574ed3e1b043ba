"""Cases that users of other systems reported, in numbers by hand: each right here, on every backend."""

import math

import pytest
import torch
from cases import backends_to_test, device_of, to_rounding
from tokenrl.corrections import importance_weights, rejection_mask

import tokenrl

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())


def loss_of(name, logp, backend, **more):
    """(loss, gradient, metrics), all on the CPU."""
    device = device_of(backend)
    leaf = logp.to(device, copy=True).requires_grad_()
    given = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in more.items()}
    old, advantages = given.pop("old_logp", None), given.pop("advantages", None)
    loss, metrics = tokenrl.policy_loss(name, leaf, old, advantages, backend=backend, **given)
    return loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu(), metrics


@EVERY_BACKEND
def test_a_kl_under_the_ratio_of_its_token_beside_a_sequence_level_gradient(backend):
    """trl#4637, slime#1004: r k3(s), r = e^(logp - old), s = logp - ref; its derivative is r s."""
    g = torch.Generator().manual_seed(0)
    logp, moves = torch.randn(2, 4, generator=g) * 0.3 - 2, 0.2 * torch.randn(2, 2, 4, generator=g)
    old, ref, mask = logp + moves[0], logp + moves[1], torch.tensor([[True] * 4, [True, True, True, False]])
    ratio, s, weight = (logp - old).exp(), logp - ref, mask / mask.sum(1, keepdim=True) / 2
    loss, grad, _ = loss_of(
        "kl_k3_unbiased", logp, backend, old_logp=ref, mask=mask, token_weight=ratio, aggregation="seq-mean-token-mean"
    )
    to_rounding(loss, (weight * ratio * (torch.expm1(-s) + s)).sum(), least=1.0)
    to_rounding(grad, weight * ratio * s, least=1.0)


@EVERY_BACKEND
def test_the_metrics_of_parts_pool_by_tokens(backend):
    """trl#7012: of 1, 5 and 0 tokens; clip_high is 1 / 6, and not the mean of the means, 1 / 2."""
    logp = torch.tensor([0.5, 0.01, -0.02, 0.03, 0.0, -0.4])

    def of(part):
        more = {"old_logp": torch.zeros_like(part), "advantages": torch.ones(1)}
        return loss_of("ppo", part, backend, cu_seqlens=torch.tensor([0, part.numel()]), **more)[2]

    found = tokenrl.Metrics.merged([of(part) for part in (logp[:1], logp[1:], logp[:0])]).as_dict()
    assert found == pytest.approx(of(logp).as_dict(), rel=1e-6) and found["clip_high"] == pytest.approx(1 / 6)


@EVERY_BACKEND
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_a_masked_row_is_no_token_of_any_count(aggregation, backend):
    """miles#2796: four tokens of loss -1 and a masked row."""
    mask = torch.tensor([[True] * 4, [False] * 4])
    more = {"advantages": torch.ones(2), "mask": mask, "aggregation": aggregation}
    loss, grad, _ = loss_of("ppo", torch.full((2, 4), -1.0), backend, **more)
    to_rounding(loss, torch.tensor(-1.0))
    to_rounding(grad, torch.where(mask, -0.25, 0.0))


@EVERY_BACKEND
def test_rejected_tokens_stay_in_the_count_or_leave_it(backend):
    """slime#657: IcePop keeps tokens 0 and 4 of five; as weights the count stays 5, as the mask too it is 2."""
    q, logp, a = torch.tensor([[0.1, -1.5, 0.8, -10.0, 0.3]]), torch.full((1, 5), -1.0), torch.ones(1)
    weights = importance_weights(logp, logp - q, bound="mask", low=0.5, high=2.0)
    icepop = {"rollout_logp": logp - q, "correction": {"bound": "mask", "low": 0.5, "high": 2.0}, "old_logp": logp}
    kept = torch.tensor([[math.exp(0.1), 0, 0, 0, math.exp(0.3)]])
    alone = {"token_weight": weights}
    for more, count in ((alone, 5), (alone | {"mask": weights != 0}, 2), (icepop, 5)):
        loss, grad, _ = loss_of("ppo", logp, backend, advantages=a, **more)
        to_rounding(loss, -kept.sum() / count)
        to_rounding(grad, -kept / count)


@EVERY_BACKEND
@pytest.mark.parametrize("aggregation", ["group-mean", "token-mean"])
def test_a_token_mean_of_each_group_is_none_of_the_batch(aggregation, backend):
    """verl#2776: groups of 3 and 1 tokens."""
    mask = torch.tensor([[True, True, False], [True, False, False], [True, False, False]])
    groups, a = torch.tensor([7, 7, 3]), torch.tensor([1.0, 1.0, -1.0])
    more = {"group_ids": groups, "mask": mask, "aggregation": aggregation}
    loss, grad, _ = loss_of("dapo", torch.full((3, 3), -1.0), backend, advantages=a, **more)
    each = {"group-mean": torch.tensor([1 / 6, 1 / 6, 1 / 2]), "token-mean": torch.tensor([0.25] * 3)}[aggregation]
    to_rounding(grad, torch.where(mask, -(each * a)[:, None], 0.0))
    to_rounding(loss, -(mask.sum(1) * each * a).sum(), least=1.0)


@EVERY_BACKEND
def test_the_horizon_of_dr_grpo_is_the_callers(backend):
    """SkyRL#1154: with normalizer = rows x horizon the padding does not matter."""
    g, pad = torch.Generator().manual_seed(0), torch.nn.functional.pad
    logp, old, a = (torch.randn(*shape, generator=g) for shape in ((6, 4), (6, 4), (6,)))
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 4, 3, 2])[:, None]
    found = []
    for by in (0, 2):
        logps, olds, valid = (pad(x, (0, by)) for x in (logp, old, mask))
        loss, grad, _ = loss_of("dr_grpo", logps, backend, old_logp=olds, advantages=a, mask=valid, normalizer=42.0)
        found.append((loss, grad[:, :4]))
    for one, other in zip(*found, strict=True):
        to_rounding(one, other, least=1 / 42)


def test_seq_mask_tis_truncates_the_rows_it_keeps():
    """OpenRLHF#1295: q = (100, -100) is kept, with weights min(e^100, 2) and e^-20; (0.1, 100) is dropped, without
    0 * inf."""
    logp = torch.full((2, 2), -1.0)
    rollout = logp - torch.tensor([[100.0, -100.0], [0.1, 100.0]])
    kept = rejection_mask(logp, rollout, statistic="seq_mean_k1", low=0.5, high=2.0)
    weights = importance_weights(logp, rollout, bound="truncate", high=2.0) * kept
    torch.testing.assert_close(weights, torch.tensor([[2.0, math.exp(-20)], [0.0, 0.0]]))
    assert tokenrl.policy_loss("ppo", logp, None, torch.ones(2), token_weight=weights)[0].isfinite()
