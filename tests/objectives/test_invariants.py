"""What the methods become at the ends of their parameters: value and gradient, on every backend."""

import math

import pytest
import torch
from cases import backends_to_test, batch, device_of, run

import tokenrl
from tokenrl.objectives.gates.bounded import PpoClip, Ratio

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
OFF = math.inf


def made(seed=0, *without, **how):
    return {name: x for name, x in batch(seed, **how).items() if name not in ("segment_ids", "token_weight", *without)}


def same(first, second, case, backend, **more):
    (loss, grad, _), (other, other_grad, _) = (
        run(row, case, backend, torch.float64, **more) for row in (first, second)
    )
    assert grad.any()
    torch.testing.assert_close(loss, other, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad, other_grad, rtol=1e-12, atol=1e-15)


@EVERY_BACKEND
def test_fiberpo_without_bounds_is_the_token_ratio(backend):
    row = tokenrl.objective("fiberpo", c_pos=OFF, c_neg=OFF, eps=OFF)
    same(row, tokenrl.objective(row, form=None), made(), backend)


@EVERY_BACKEND
def test_fiberpo_passes_its_gradient_at_the_bounds(backend):
    """Of two log ratios 1/8, -1/8: S+ = S- = 1/16, num = +-1/16, den = -+1/16, all of them exact."""
    logp = torch.full((1, 2), -1.0, dtype=torch.float64)
    case = {"logp": logp, "old_logp": logp - torch.tensor([[0.125, -0.125]]), "advantages": torch.ones(1).double()}
    at = tokenrl.objective("fiberpo", c_pos=0.0625, c_neg=0.0625, eps=0.0625)
    same(at, tokenrl.objective(at, form=None), case, backend)


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["ctpo", "ctpo_geomean"])
def test_ctpo_of_single_tokens_is_ppo_with_log_bounds(name, backend):
    g = torch.Generator().manual_seed(0)
    logp, x, a = (0.3 * torch.randn(40, *more, dtype=torch.float64, generator=g) for more in ((1,), (1,), ()))
    case = {"logp": logp - 1, "old_logp": logp - 1 - x, "advantages": a}
    row = tokenrl.objective(name, eps_low=0.2, eps_high=0.3, eps_dual=0.5, power=0.0)
    ppo = PpoClip(1 - math.exp(-0.2), math.exp(0.3) - 1, math.exp(0.5))
    same(row, tokenrl.objective("grpo", gate=ppo), case, backend)


@EVERY_BACKEND
@pytest.mark.parametrize("x", [-0.4, 0.4])
def test_minpro_after_one_odd_token(x, backend):
    logp = torch.full((1, 5), -1.0, dtype=torch.float64)
    case = {
        "logp": logp,
        "old_logp": logp - torch.tensor([0, 0, x, 0, 0], dtype=torch.float64),
        "advantages": torch.ones(1, dtype=torch.float64),
    }
    weights = [1, 1, math.exp(x), *[min(1, math.exp(x))] * 2]
    for name in ("minpro", "minpro_capped"):
        _, grad, _ = run(name, case, backend, torch.float64)
        assert (-5 * grad[0]).tolist() == pytest.approx(weights)
    # If the odd token is the first, nothing but the cap keeps its ratio from the later ones.
    case["old_logp"] = logp - torch.tensor([x, 0, 0, 0, 0], dtype=torch.float64)
    _, grad, _ = run("minpro", case, backend, torch.float64)
    assert (-5 * grad[0]).tolist() == pytest.approx([math.exp(x), math.exp(x), *[min(1, math.exp(x))] * 3])
    _, grad, _ = run("minpro_capped", case, backend, torch.float64)
    assert (-5 * grad[0]).tolist() == pytest.approx([math.exp(x), *[min(1, math.exp(x))] * 4])


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["dhpo", "dhpo_branch"])
def test_dhpo_lies_between_grpo_and_gspo_token(name, backend):
    token, span = {"eps_low": 0.1, "eps_high": 0.15}, {"span_eps_low": 0.03, "span_eps_high": 0.05}
    grpo = tokenrl.objective("grpo", **token)
    gspo = tokenrl.objective("gspo_token", gate=PpoClip(0.03, 0.05), cap=OFF, clamp=20.0)
    same(tokenrl.objective(name, mix=1.0, **token, **span), grpo, made(2), backend)
    same(tokenrl.objective(name, mix=0.0, **token, **span), gspo, made(2), backend)
    mixed = run(tokenrl.objective(name, mix=0.5, **token, **span), made(2), backend, torch.float64)
    assert not torch.equal(mixed[1], run(grpo, made(2), backend, torch.float64)[1])


@EVERY_BACKEND
@pytest.mark.parametrize("mix", [0.3, 0.5])
@pytest.mark.parametrize("name", ["dhpo", "dhpo_branch"])
def test_a_mixture_that_nothing_clips_counts_no_clip(name, mix, backend):
    """Both sides of its minimum are one number, and not two roundings of it."""
    row = tokenrl.objective(name, mix=mix, eps_low=0.9, eps_high=9.0, span_eps_low=0.9, span_eps_high=9.0)
    raw = run(row, made(2), backend, torch.float32)[2]
    assert raw[0] > 20 and not raw[4:7].any()


@EVERY_BACKEND
def test_sspo_of_one_span_is_gspo_token_and_of_single_tokens_grpo(backend):
    case, bounds = made(3), {"eps_low": 0.05, "eps_high": 0.08}
    sspo = tokenrl.objective("sspo", **bounds)
    same(sspo, tokenrl.objective("gspo_token", **bounds), case, backend)
    rows, width = case["logp"].shape
    single = case | {"segment_ids": torch.arange(width).expand(rows, width)}
    found = run(sspo, single, backend, torch.float64)
    grpo = run(tokenrl.objective("grpo", **bounds), case, backend, torch.float64)
    for got, expected in zip(found[:2], grpo[:2], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


@EVERY_BACKEND
@pytest.mark.parametrize("name,changes", [("hapo", {"score": 0.0, "dual": OFF}), ("rmt", {"ntp": 0.0})])
def test_without_their_extra_they_are_ppo(name, changes, backend):
    same(tokenrl.objective(name, **changes), "ppo", made(4), backend)


@EVERY_BACKEND
def test_gmpo_without_a_clip_is_gspo_without_one(backend):
    gspo = tokenrl.objective("gspo", gate=Ratio())
    same(tokenrl.objective("gmpo", eps_low=OFF, eps_high=OFF), gspo, made(5), backend)


@EVERY_BACKEND
def test_gmpo_and_hmpo_agree_where_all_ratios_are_equal(backend):
    case = made(6)
    case["old_logp"] = case["logp"] - 0.2
    same("gmpo", "hmpo", case, backend)


@EVERY_BACKEND
def test_cppo_without_a_budget_is_dppo_on_the_way_out(backend):
    """delta_b without bound and w_min = 1: what is kept is what DPPO-TV keeps, and the gradient is the ratio's."""
    case = made(7)
    case["advantages"][1] = 0.5  # DPPO's counters take A = 0 for negative
    cppo = tokenrl.objective("cppo", delta=0.05, delta_b=1e9, quantile=None, w_min=1.0)
    dppo = tokenrl.objective("dppo_tv", eps_low=0.05, eps_high=0.05, ceiling=OFF, aggregation="token-mean")
    (_, grad, raw), (_, other, other_raw) = (run(row, case, backend, torch.float64) for row in (cppo, dppo))
    assert 0 < (grad != 0).sum() < case["mask"].sum()
    torch.testing.assert_close(grad, other, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(raw[4:6], other_raw[4:6])


@EVERY_BACKEND
def test_fipo_on_policy_is_ppo(backend):
    case = made(8)
    case["old_logp"] = case["logp"].clone()
    same("fipo", "ppo", case, backend)


@EVERY_BACKEND
def test_real_of_two_rows_pushes_them_apart(backend):
    """One right and one wrong row: the loss of the right one falls with its ratio, that of the wrong one rises."""
    logp = torch.full((2, 2), -1.0, dtype=torch.float64)
    case = {"logp": logp, "old_logp": logp.clone(), "advantages": torch.tensor([1.0, -1.0])}
    group = torch.zeros(2, dtype=torch.int64).to(device_of(backend))
    loss, grad, _ = run("real", case, backend, torch.float64, group_ids=group)
    assert loss.item() == pytest.approx(2 * math.log(2))
    assert grad.tolist() == [pytest.approx([-0.5] * 2), pytest.approx([0.5] * 2)]  # 1/2 of 1 / tau, over two tokens


@EVERY_BACKEND
def test_a_dropped_token_may_have_any_weight(backend):
    """CPPO's factor of 0 hides an infinite weight, as a mask would."""
    logp = torch.full((1, 2), -0.1, dtype=torch.float64)
    case = {"logp": logp, "old_logp": logp - torch.tensor([2.0, 0.0]), "advantages": torch.ones(1)}
    case["token_weight"] = torch.tensor([[math.inf, 1.0]])
    loss, grad, _ = run("cppo", case, backend, torch.float64)
    assert loss.item() == -0.5 and grad.tolist() == [[0.0, -0.5]]
