"""BandPO's bounds: official outputs (tests/golden), what a band spends, and its edges."""

import math

import pytest
import torch
from golden_data import INDEX, arrays, near

from tokenrl import bounds


def of(row):
    return torch.tensor([row], dtype=torch.float64)


@pytest.mark.parametrize("case", ["0.bandtv", "1.bandchi2", "2.bandkl", "3.bandkl"])
def test_golden_band(case):
    x, config = arrays("bandpo_bounds", case), INDEX["bandpo_bounds"]["cases"][case]["config"]
    kind = config["method"].removeprefix("band")
    low, high = bounds.bandpo(
        x["old_logp"], kind=kind, delta=config["delta"], eps_low=config["eps_clip_low"],
        eps_high=config["eps_clip_high"], relax=config["does_relax_high_p_bound"], ceiling=config["upper_bound_max"],
    )  # fmt: skip
    if kind == "kl":  # theirs ends its bisection at 1e-6
        assert (1 - low - x["lower"]).abs().max() < 1e-6 and (1 + high - x["upper"]).abs().max() < 1e-6
    else:
        near(1 - low, x["lower"], "lower")
        near(1 + high, x["upper"], "upper")
    assert x["lower"].unique().numel() > 10, "bounds that are all at a limit test nothing"


@pytest.mark.parametrize("delta", [1e-3, 0.05, 0.7])
def test_band_spends_delta_or_meets_the_simplex(delta):
    p = of([2e-6, 1e-4, 0.01, 0.2, 0.5, 0.9, 0.999])
    spent = {
        "tv": lambda p, r: p * abs(r - 1),
        "chi2": lambda p, r: (r - 1) ** 2 * p / (1 - p),
        "kl": lambda p, r: -p * math.log(r) - (1 - p) * math.log((1 - r * p) / (1 - p)) if 0 < r < 1 / p else math.inf,
    }
    inner = 0
    for kind, divergence in spent.items():
        low, high = bounds.bandpo(p.log(), kind=kind, delta=delta, relax=False, ceiling=math.inf)
        for p_t, low_t, high_t in zip(p[0].tolist(), low[0].tolist(), high[0].tolist(), strict=True):
            for r, limit in ((1 - low_t, 0.0), (1 + high_t, 1 / p_t)):
                if r == pytest.approx(limit, rel=1e-9, abs=1e-12):
                    assert kind == "kl" or divergence(p_t, limit) <= delta * (1 + 1e-9)
                else:
                    assert divergence(p_t, r) == pytest.approx(delta, rel=1e-6), (kind, p_t, r)
                    inner += 1
    assert inner > 12


def test_band_limits_window_and_ceiling():
    logp = of([0.0, -1e-7, -math.inf, -20.0, 1e-3])
    for kind, sure in (("tv", 0.05), ("chi2", 0.0), ("kl", 1 - math.exp(-0.05))):
        low, high = bounds.bandpo(logp, kind=kind, relax=False)
        near(low, of([sure, sure, 1.0, 1.0, sure]), kind)
        near(high, of([0.0, 0.0, 99.0, 99.0, 0.0]), kind)
        low, high = bounds.bandpo(logp, kind=kind, eps_low=0.1, eps_high=0.3, ceiling=7)
        near(low, of([0.1, 0.1, 1.0, 1.0, 0.1]), kind)
        near(high, of([0.3, 0.3, 6.0, 6.0, 0.3]), kind)
    assert bounds.bandpo(logp, kind="tv", delta=2.0, relax=False)[0].tolist() == [[1.0] * 5]
    assert bounds.bandpo(logp, ceiling=math.inf)[1].max() == 1e12 - 1
    for x in bounds.bandpo(torch.tensor([[math.nan, -1.0]]), kind="kl"):
        assert x.dtype == torch.float32 and x.isnan().tolist() == [[True, False]]
