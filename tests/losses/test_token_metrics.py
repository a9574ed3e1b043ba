"""token_metrics against the metrics of policy_loss and against formulas typed out per token."""

import math

import cases
import pytest
import torch
from cases import backends_to_test, device_of, interpreted, thinned
from linear_policy_cases import KL_ROWS

import tokenrl
from tokenrl.instruments.parity import close
from tokenrl.objectives.metrics import EXTREMES, RAW

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
ROWS = [name for name, row in tokenrl.OBJECTIVES.items() if row.form is None]
FORMS = [name for name in tokenrl.OBJECTIVES if name not in ROWS]
TOKENS = ("logp", "old_logp", "advantages", "mask", "segment_ids", "cu_seqlens")
CHANGES = {  # so that much is clipped
    "sspo": {"eps_low": 0.02, "eps_high": 0.03}, "topr": {"ceiling": 0.9}, "cispo": {"eps_low": 0.95, "eps_high": 1.2},
    "dppo_tv": {"eps_low": 0.02, "eps_high": 0.03, "ceiling": 1.2}, "dppo_kl": {"ceiling": 1.2},
    "dppo_topk": {"divergence": 0.2, "ceiling": 1.1},
}  # fmt: skip


def kinds():
    """A batch of each kind: padded with holes, an empty row and NaN in masked cells; packed; in segments."""
    padded = cases.batch(3)
    segments = {name: padded[name] for name in TOKENS if name in padded}
    plain = {name: x for name, x in segments.items() if name != "segment_ids"}
    a = cases.grid(5, 19, sigma=1.0, generator=torch.Generator().manual_seed(0))
    per_token = plain | {"advantages": torch.where(padded["mask"], a, torch.nan)}
    flat = cases.packed(segments)
    return {"padded": plain, "advantages per token": per_token, "packed": flat, "segments": segments}


def counted(objective, case, backend, dtype=torch.float64):
    """(token_metrics, the raw metrics of policy_loss), on the CPU."""
    given = {name: x.to(device_of(backend), dtype if x.is_floating_point() else None) for name, x in case.items()}
    first = [given.pop(name) for name in ("logp", "old_logp", "advantages")]
    found = tokenrl.token_metrics(objective, *first, backend=backend, **given)
    more = {"aggregation": "token-mean"}  # which has no part in them
    return found, tokenrl.policy_loss(objective, *first, backend=backend, **given, **more)[1].raw.cpu()


# The interpreter takes the batch that has everything.
CALLS = [(kind, b) for kind in kinds() for b in backends_to_test() if not interpreted(b) or kind == "packed"]


def made(name):
    return tokenrl.objective(name, **CHANGES.get(name, {}))


@pytest.mark.parametrize("kind,backend,name", [(*call, name) for call in CALLS for name in thinned(ROWS, call[1])])
def test_the_sums_of_sequences_are_those_of_the_batch(name, kind, backend):
    case = kinds()[kind]
    found, raw = counted(made(name), case, backend)
    sums = found.sequence_sums().cpu()
    rows = case["cu_seqlens"].numel() - 1 if kind == "packed" else case["mask"].shape[0]
    assert sums.shape == (rows, len(tokenrl.Metrics.RAW)) and sums.dtype == torch.float64
    merged = tokenrl.Metrics.merged([tokenrl.Metrics(row) for row in sums])
    torch.testing.assert_close(merged.raw, raw, rtol=1e-11, atol=1e-12)


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["ppo", "gspo", "ctpo", "vespo"])
def test_each_sequence_has_the_metrics_of_its_own_batch(name, backend):
    case = kinds()["padded"]
    sums = counted(made(name), case, backend)[0].sequence_sums().cpu()
    for row, own in enumerate(sums):
        alone = counted(made(name), {key: x[row : row + 1] for key, x in case.items()}, backend)[1]
        torch.testing.assert_close(own, alone, rtol=1e-11, atol=1e-12)


@EVERY_BACKEND
@pytest.mark.parametrize("name,largest", [("ppo", 20), ("ctpo", 10), ("gspo_token", 10), ("gspo", 25), ("vespo", 20)])
def test_stale_tokens_are_clamped_and_capped_alike(name, largest, backend):
    x = torch.tensor([[50.0, 0.0], [-30.0, 1.0]], dtype=torch.float64)
    case = {"logp": x, "old_logp": torch.zeros_like(x), "advantages": torch.tensor([1.0, -1.0], dtype=torch.float64)}
    found, raw = counted(name, case, backend)
    merged = tokenrl.Metrics.merged([tokenrl.Metrics(row) for row in found.sequence_sums().cpu()])
    torch.testing.assert_close(merged.raw, raw, rtol=1e-11, atol=1e-12)
    assert found.ratio.max().item() == pytest.approx(math.exp(largest))


def test_bounds_of_these_batches_are_met():
    rows = set(ROWS) - set(KL_ROWS)
    most = torch.stack([counted(made(name), kinds()["segments"], "reference")[1] for name in rows]).amax(0)
    assert all(most[RAW.index(name)] >= 2 for name in RAW if name.startswith("clip_")), most


@pytest.mark.parametrize("backend", cases.kernel_backends())
@pytest.mark.parametrize("name", ["ppo", "ctpo", "gspo", "minpro", "vespo", "dppo_tv"])
def test_in_fp32_they_are_as_near_to_the_truth_as_the_reference(name, backend):
    def make(seed):
        return {key: x for key, x in cases.batch(seed).items() if key in TOKENS}

    case = cases.away_from_edges(made(name), make)
    calls = ((backend, torch.float32), ("reference", torch.float64), ("reference", torch.float32))
    found = [counted(made(name), case, *call)[0].sequence_sums().cpu().to(call[1]) for call in calls]
    for entry, *columns in zip(RAW, *(sums.unbind(1) for sums in found), strict=True):
        close(*columns, what=entry)


@EVERY_BACKEND
def test_tokens_by_their_formulas(backend):
    """PPO with a dual clip, GSPO and CTPO, of one row with a hole and one of negative advantage."""
    x = torch.tensor([[0.3, math.nan, -0.5, 0.1], [-0.4, 0.9, 0.05, 2.0]], dtype=torch.float64)
    mask, a = ~x.isnan(), torch.tensor([1.0, -1.0], dtype=torch.float64)
    case = {"logp": x - 1, "old_logp": torch.full_like(x, -1), "advantages": a, "mask": mask}
    x = x.nan_to_num(0)
    count = mask.sum(1, keepdim=True)
    band = mask.cumsum(1).double().clamp(min=1).sqrt()
    mean, prefix, positive = (x.sum(1, keepdim=True) / count).expand_as(x), x.cumsum(1), a[:, None] > 0
    rows = {  # name: (statistic, lower, upper, dual bound of it)
        "ppo": (tokenrl.objective("ppo", dual=3.0), x, math.log(0.8), math.log(1.2), math.log(3)),
        "gspo": (tokenrl.objective("gspo", eps_low=0.1, eps_high=0.2), mean, math.log(0.9), math.log(1.2), math.inf),
        "ctpo": (tokenrl.objective("ctpo"), prefix, -0.025 * band, 0.05 * band, 0.05 * band),
    }
    for objective, s, low, high, dual in rows.values():
        found, _ = counted(objective, case, backend)
        expected = {
            "ratio": s.exp() * mask, "log_ratio": x, "approx_kl": x.expm1() - x,
            "clip_low": mask & ~positive & (s < low), "clip_high": mask & positive & (s > high),
            "clip_dual": mask & ~positive & (s > dual),
        }  # fmt: skip
        for name, value in expected.items():
            own = getattr(found, name)
            assert own.shape == (2, 4) and own.dtype == value.dtype and not own.requires_grad
            torch.testing.assert_close(
                own.cpu(), value, rtol=1e-12, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_what_trl_counts_of_sequences():
    """The least and the largest share of clipped tokens of any row, and its shares at sequence level."""
    case = kinds()["padded"]
    found, _ = counted("grpo", case, "reference")
    sums = dict(zip(tokenrl.Metrics.RAW, found.sequence_sums().unbind(1), strict=True))
    mask, a = case["mask"], case["advantages"][:, None]
    ratio = torch.where(mask, case["logp"] - case["old_logp"], 0).exp()
    low, high = (ratio < 0.8) & (a < 0) & mask, (ratio > 1.2) & (a > 0) & mask
    some = mask.any(1)
    for name, clipped in (("clip_low", low), ("clip_high", high)):
        expected = clipped.sum(1)[some] / mask.sum(1)[some]
        assert expected.max() > expected.min()
        torch.testing.assert_close((sums[name] / sums["tokens"])[some], expected.double())


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_refused_by_name(name):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=rf"^objective: got '{name}', which has a form, accepted: "):
        tokenrl.token_metrics(name, x, x, x[:, 0])


@EVERY_BACKEND
def test_no_gradient_on_policy_and_nothing(backend):
    """A log-prob that wants a gradient is read and no more; old_logp None is logp; batches of no tokens."""
    logp = torch.zeros(2, 3, device=device_of(backend), requires_grad=True)
    a = torch.ones(2, device=logp.device)
    found = tokenrl.token_metrics("ppo", logp, None, a, backend=backend)
    assert found.ratio.eq(1).all() and not found.log_ratio.any() and not found.ratio.requires_grad
    assert not found.sequence_sums().requires_grad and found.sequence_sums()[:, 0].tolist() == [3, 3]
    masked = tokenrl.token_metrics("ppo", logp, None, a, mask=torch.zeros_like(logp).bool(), backend=backend)
    assert not masked.ratio.any() and masked.sequence_sums().tolist() == [[0, 0, math.inf, -math.inf] + [0] * 8] * 2
    for rows in (logp[:0], logp[:, :0]):
        empty = tokenrl.token_metrics("gspo", rows, rows.detach(), a[: len(rows)], backend=backend)
        assert empty.ratio.shape == rows.shape and empty.sequence_sums().shape == (len(rows), 12)
    assert set(EXTREMES) & set(RAW) == {"ratio_min", "ratio_max"}
