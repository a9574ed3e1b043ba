"""Metrics of batches that fp32 sums would not hold: ratios beyond its range, differences below it, many tokens."""

import math

import pytest
import torch
from cases import backends_to_test, device_of

import tokenrl
from tokenrl.objectives.excess import excess

# The interpreter overflows and divides before it selects.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
SMALL = [s * x for x in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.3, 0.7) for s in (1, -1)]


def evaluated(objective, log_ratios, backend, dtype=torch.float32):
    """(loss, gradient by log-prob, metrics) of one sequence of log-probs around -2, of advantage 1."""
    x = torch.tensor([log_ratios], dtype=dtype, device=device_of(backend))
    logp = torch.full_like(x, -2).requires_grad_()
    loss, metrics = tokenrl.policy_loss(objective, logp, logp.detach() - x, torch.ones_like(x[:, 0]), backend=backend)
    return loss.item(), torch.autograd.grad(loss, logp)[0].flatten().tolist(), metrics


@EVERY_BACKEND
@pytest.mark.parametrize("x", [50.0, 60.0, -59.0, 170.0])
def test_ess_is_that_of_equal_ratios_however_large(x, backend):
    """(sum r)^2 / (n sum r^2) does not change when all r are scaled."""
    metrics = evaluated(tokenrl.objective("gspo", clamp=math.inf), [x, x], backend)[2]
    assert metrics.ess == pytest.approx(1, rel=1e-6)
    assert metrics.ratio_mean == pytest.approx(math.exp(x), rel=1e-4) == pytest.approx(metrics.ratio_max, rel=1e-4)


@EVERY_BACKEND
def test_one_stale_token_leaves_the_metrics_finite(backend):
    loss, grad, metrics = evaluated("dro", [89.0, 0.0, -89.0], backend)
    beta = tokenrl.objective("dro").gate.beta
    assert metrics.approx_kl == pytest.approx((math.expm1(89) - 89 + math.expm1(-89) + 89) / 3, rel=1e-5)
    assert metrics.ratio_mean == pytest.approx((math.exp(89) + 1) / 3, rel=1e-5)
    assert metrics.ratio_max == pytest.approx(math.exp(89), rel=1e-5)
    assert metrics.ratio_min == pytest.approx(math.exp(-89), rel=1e-5)
    assert metrics.ess == pytest.approx(1 / 3, rel=1e-5)
    assert grad == pytest.approx([(beta * x - 1) / 3 for x in (89, 0, -89)], rel=1e-5)
    assert loss == pytest.approx(2 + beta * 89**2 / 3, rel=1e-5)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_rows_take_part_in_no_extreme(dtype, backend):
    """Also of a batch whose other rows are masked."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype, device=device_of(backend))
    mask = torch.tensor([[True, True], [False, False]], device=x.device)
    found = tokenrl.policy_loss("grpo", x, torch.zeros_like(x), x[:, 0], mask=mask, backend=backend)[1]
    assert found.raw.dtype == torch.float64 and found.tokens == 2
    assert found.ratio_min == pytest.approx(math.exp(1)) and found.ratio_max == pytest.approx(math.exp(2))
    none = tokenrl.policy_loss("grpo", x, torch.zeros_like(x), x[:, 0], mask=mask & False, backend=backend)[1]
    assert none.raw.tolist() == [0, 0, math.inf, -math.inf, *[0] * 8]


# (gate's objective, x -> (below, above) for either sign of A, by the definition alone)
BOUNDS = {
    "ppo": (tokenrl.objective("ppo"), lambda x, a: (a < 0 and x < math.log(0.8), a > 0 and x > math.log(1.2))),
    "cispo": (
        tokenrl.objective("cispo", eps_low=0.7, eps_high=1.3),
        lambda x, a: (math.exp(x) < 0.7, math.exp(x) > 1.3),
    ),
    "topr": (tokenrl.objective("topr_roll"), lambda x, a: (a <= 0 and x > 0, False)),
    "gmpo": (tokenrl.objective("gmpo"), lambda x, a: (a < 0 and x < -0.4, a >= 0 and x > 0.4)),
    "fipo": (tokenrl.objective("fipo"), lambda x, a: (a < 0 and x < math.log(0.8), a > 0 and x > math.log(1.28))),
}


@EVERY_BACKEND
@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("per_token", [False, True])
def test_log_ratios_and_clipped_tokens_of_positive_advantage(name, per_token, backend):
    """A row of A > 0, one of A < 0, one of A = 0; more tokens than the kernels sum up at once, masked ones of NaN."""
    objective, clipped = BOUNDS[name]
    g = torch.Generator().manual_seed(1)
    count = 60 if backend == "triton" else 1500
    x = torch.randn(3, count, generator=g).clamp(-1.9, 1.9)
    mask, a = torch.rand(3, count, generator=g) < 0.8, torch.tensor([1.0, -2.0, 0.0])
    signs = a[torch.randint(0, 3, x.shape, generator=g)] if per_token else a[:, None].expand_as(x)
    device = device_of(backend)
    old = torch.full_like(x, -2.0)
    logp = torch.where(mask, old + x, torch.nan)
    given = [y.to(device) for y in (logp, old, signs if per_token else a)]
    found = tokenrl.policy_loss(objective, *given, mask=mask.to(device), backend=backend)[1]
    tokens = list(zip((logp - old)[mask].double().tolist(), signs[mask].tolist(), strict=True))
    counts = [[clipped(x, a) for x, a in tokens if a > 0 or not alone] for alone in (False, True)]
    for which, bound in enumerate(("clip_low", "clip_high")):
        for some, suffix in zip(counts, ("", "_pos"), strict=True):
            expected = sum(pair[which] for pair in some) / len(tokens)
            assert getattr(found, bound + suffix) == pytest.approx(expected, rel=1e-12), bound + suffix
    mean = math.fsum(x for x, _ in tokens) / len(tokens)
    assert found.log_ratio_mean == pytest.approx(mean, abs=1e-6) and not found.raw.requires_grad


@EVERY_BACKEND
def test_the_mean_log_ratio_is_of_clamped_ones(backend):
    for objective, expected in (("ppo", (20 - 20 + 1) / 3), ("gspo", (50 - 30 + 1) / 3)):
        assert evaluated(objective, [50.0, -30.0, 1.0], backend)[2].log_ratio_mean == pytest.approx(expected, rel=1e-6)


def test_tokens_are_counted_beyond_2_to_the_24():
    """fp32 has no 2^24 + 1."""
    count = 2**24 + 1
    x = torch.zeros(count)
    for backend in set(backends_to_test()) & {"cpu"}:  # the reference takes ten seconds
        _, found = tokenrl.policy_loss(
            "grpo", x, x, x[:1], cu_seqlens=torch.tensor([0, count]), normalizer=1.0, backend=backend
        )
        assert found.tokens == count and found.ratio_mean == 1 and found.ess == 1


@EVERY_BACKEND
@pytest.mark.parametrize("objective", ["kl_k3", "kl_k3_unbiased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_of_nearby_policies(dtype, objective, backend):
    """s = logp - ref: e^-s + s - 1 = s^2 / 2 - s^3 / 6 + s^4 / 24 - ..., whose derivative is 1 - e^-s."""
    for s in SMALL:
        loss, (grad,), metrics = evaluated(objective, [s], backend, dtype)
        s = (torch.tensor(-2, dtype=dtype) - torch.tensor(-2 - s, dtype=dtype)).item()  # as the log-probs are rounded
        if s != 0:
            assert loss == pytest.approx(k3(-s), rel=1e-6)
            assert grad == pytest.approx(s if objective.endswith("unbiased") else -math.expm1(-s), rel=1e-6)
            assert metrics.approx_kl == pytest.approx(k3(s), rel=1e-6)


@EVERY_BACKEND
@pytest.mark.parametrize("objective", ["ppo", "gmpo", "hmpo", "fiberpo"])
def test_approx_kl_of_nearby_policies(objective, backend):
    for x in (1e-7, -1e-6, 1e-4):
        logp = torch.tensor([[x]], device=device_of(backend))
        found = tokenrl.policy_loss(objective, logp, torch.zeros_like(logp), logp[:, 0], backend=backend)[1]
        assert found.approx_kl == pytest.approx(k3(x), rel=1e-5)


def k3(x: float) -> float:
    """e^x - 1 - x, of which the direct form loses half the digits at 1e-4."""
    if abs(x) > 0.2:
        return math.expm1(x) - x
    return math.fsum(x**n / math.factorial(n) for n in range(2, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excess_and_its_derivative_are_right_to_a_few_ulps(dtype):
    x = torch.tensor([*SMALL, 0.499, -0.499, 0.501, 20.0, -20.0], dtype=dtype).requires_grad_()
    y = excess(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    close = 4 * torch.finfo(dtype).eps
    assert y.tolist() == pytest.approx([k3(v) for v in x.tolist()], rel=4 * close)
    assert grad.tolist() == pytest.approx([math.expm1(v) for v in x.tolist()], rel=close)
    far = torch.tensor(-1e30, dtype=dtype).requires_grad_()
    assert torch.autograd.grad(excess(far), far)[0] == -1, "and not 0 times the infinite slope of its series"
