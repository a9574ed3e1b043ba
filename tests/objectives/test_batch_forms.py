"""Objectives whose sequences or tokens meet in the whole batch, REAL, FIPO and covariances: their formulas typed out in
floats and loops, value and gradient, on every backend."""

import math

import pytest
import torch
from by_loops import called, clipped, made, ratios, same
from cases import backends_to_test, device_of, packed

import tokenrl

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())


@EVERY_BACKEND
def test_real(backend):
    case, cells = made(rows=8)
    d, a, groups, tau = ratios(case, cells), case["advantages"].tolist(), case["group_ids"].tolist(), 0.5
    of_row = {i: [cell for cell in cells if cell[0] == i] for i in range(8)}
    s = {i: sum(d[cell] for cell in own) / len(own) for i, own in of_row.items() if own}
    loss, slope, known = 0.0, dict.fromkeys(s, 0.0), {groups[i] for i in s}
    for group in known:
        positive = [i for i in s if groups[i] == group and a[i] > 0]
        negative = [i for i in s if groups[i] == group and a[i] <= 0]
        if not positive or not negative:
            continue
        for members, sign in ((positive, -1), (negative, 1)):
            terms = {i: math.exp(sign * s[i] / tau) for i in members}
            total = 1 + sum(terms.values())
            loss += math.log(total) / len(known)
            for i, term in terms.items():
                slope[i] += sign * term / (tau * total) / len(known)
    gradient = torch.zeros_like(case["advantages"])[:, None].expand(case["mask"].shape).clone()
    for i, own in of_row.items():
        for cell in own:
            gradient[cell] = slope[i] / len(own)
    assert loss > 0 and gradient.any()
    same(called("real", case, backend), loss, gradient)
    flat = packed(case)
    lengths = flat["cu_seqlens"].diff()
    same(called("real", flat, backend), loss, gradient[torch.arange(gradient.shape[1]) < lengths[:, None]])


@EVERY_BACKEND
def test_real_takes_no_weights(backend):
    case, _ = made(rows=4)
    ones = torch.ones_like(case["logp"])
    for more, message in (
        ({"aggregation": "token-mean"}, "aggregation: got 'token-mean', accepted: 'group-mean'"),
        ({"token_weight": ones}, "token_weight: got a tensor, accepted: None"),
        ({"segment_ids": ones.long()}, "segment_ids: got a tensor, accepted: None"),
        ({"advantages": ones}, "advantages: got one per token, accepted: one per sequence"),
    ):
        more = {name: x.to(device_of(backend)) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
        with pytest.raises(ValueError, match=f"^{message}"):
            called("real", {**case, **({"advantages": ones} if "advantages" in more else {})}, backend, **{
                name: x for name, x in more.items() if name != "advantages"
            })  # fmt: skip


@EVERY_BACKEND
@pytest.mark.parametrize("holes", ["skip", "count"])
def test_fipo(holes, backend):
    case, cells = made(3)
    place = {(i, t): t if holes == "count" else case["mask"][i, :t].sum().item() for i, t in cells}
    d, a, half_life, ceiling = ratios(case, cells), case["advantages"].tolist(), 4.0, 1.6
    loss, gradient, factors = 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64), set()
    for i, t in cells:
        later = {(i, k): x for (j, k), x in d.items() if j == i and k >= t and math.exp(x) <= ceiling}
        future = sum(2 ** (-(place[cell] - place[i, t]) / half_life) * x for cell, x in later.items())
        factor = min(max(math.exp(future), 0.9), 1.3)
        r = math.exp(d[i, t])
        if a[i] < 0 and r > 1.4:
            factor = min(max(factor, 0.8), 1.0)
        value, slope = clipped(r, a[i], high=1.28)
        loss += factor * value / len(cells)
        gradient[i, t] = factor * slope / len(cells)
        factors.add(round(factor, 6))
    assert {0.9, 1.0, 1.3} < factors
    row = tokenrl.objective("fipo", half_life=half_life, low=0.9, high=1.3, ceiling=ceiling, safety=1.4, holes=holes)
    same(called(row, case, backend), loss, gradient)


def covariances(case, cells):
    a = {cell: case["advantages"][cell[0]].item() for cell in cells}
    logp = {cell: case["logp"][cell].item() for cell in cells}
    mean_a, mean_logp = sum(a.values()) / len(cells), sum(logp.values()) / len(cells)
    return {cell: (a[cell] - mean_a) * (logp[cell] - mean_logp) for cell in cells}, mean_a, mean_logp


@EVERY_BACKEND
def test_kl_cov(backend):
    case, cells = made(1)
    d, (covariance, *_) = ratios(case, cells), covariances(case, cells)
    top = sorted(cells, key=covariance.get)[-int(0.2 * len(cells)) :]
    loss, gradient = 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64)
    for cell in cells:
        a, r = case["advantages"][cell[0]].item(), math.exp(d[cell])
        loss += (-a * r + 0.3 * abs(d[cell]) * (cell in top)) / len(cells)
        gradient[cell] = (-a * r + 0.3 * math.copysign(1, d[cell]) * (cell in top)) / len(cells)
    same(called(tokenrl.objective("kl_cov", fraction=0.2, coef=0.3), case, backend), loss, gradient)


def clip_cov_by_hand(case, cells, dropped):
    d, loss = ratios(case, cells), 0.0
    gradient = torch.zeros(case["mask"].shape, dtype=torch.float64)
    for cell in cells:
        if cell not in dropped:
            value, slope = clipped(math.exp(d[cell]), case["advantages"][cell[0]].item())
            loss += value / len(cells)
            gradient[cell] = slope / len(cells)
    return loss, gradient


def candidates(case, cells, low=0.02, high=0.9):
    d, (covariance, *_) = ratios(case, cells), covariances(case, cells)

    def is_clipped(cell):
        a, r = case["advantages"][cell[0]].item(), math.exp(d[cell])
        return (a > 0 and r > 1.2) or (a < 0 and r < 0.8)

    return [cell for cell in cells if low < covariance[cell] < high and not is_clipped(cell)]


@EVERY_BACKEND
def test_clip_cov(backend):
    case, cells = made(2)
    case["advantages"][1] = 0.4  # what is dropped is to be seen
    inside = candidates(case, cells)
    assert 4 < len(inside) < len(cells) - 4
    found = called(tokenrl.objective("clip_cov", fraction=1.0, low=0.02, high=0.9), case, backend)
    same(found, *clip_cov_by_hand(case, cells, inside))
    fraction = 3.5 / len(cells)  # three of them, at random
    row = tokenrl.objective("clip_cov", fraction=fraction, low=0.02, high=0.9)
    choices = set()
    for seed in range(6):
        torch.manual_seed(seed)
        found = called(row, case, backend)
        whole = called("ppo", case, backend)
        dropped = [cell for cell in inside if found[1][cell] == 0 and whole[1][cell] != 0]
        assert len(dropped) == 3
        same(found, *clip_cov_by_hand(case, cells, dropped))
        choices.add(tuple(dropped))
    assert len(choices) > 1


@EVERY_BACKEND
def test_a_rate_drops_its_share_of_those_within(backend):
    """Each by a draw of its own: of 24 draws half of the candidates, to three standard deviations."""
    case, cells = made(2)
    inside, dropped = candidates(case, cells), 0
    row, whole = tokenrl.objective("clip_cov", rate=0.5, low=0.02, high=0.9), called("ppo", case, backend)
    for seed in range(24):
        torch.manual_seed(seed)
        gradient = called(row, case, backend)[1]
        now = [cell for cell in cells if gradient[cell] == 0 and whole[1][cell] != 0]
        assert set(now) <= set(inside)
        dropped += len(now)
    seen = sum(whole[1][cell] != 0 for cell in inside).item() * 24
    assert abs(dropped - seen / 2) < 3 * (seen / 4) ** 0.5


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_covariances_of_a_split_batch(name, backend):
    """With the means of the whole batch and its threshold, or its rate, its parts select what the whole does."""
    case, cells = made(4, rows=6)
    found, mean_a, mean_logp = covariances(case, cells)
    ordered = sorted(found.values(), reverse=True)
    how, whose, of_parts = {
        "clip_cov": ({"low": 0.1, "high": 0.9}, {"fraction": 1.0}, {"rate": 1.0}),
        "kl_cov": ({"coef": 0.3}, {"fraction": 5.5 / len(cells)}, {"threshold": sum(ordered[4:6]) / 2}),
    }[name]
    whole = called(tokenrl.objective(name, **how, **whose), case, backend)
    assert not torch.equal(whole[1], called("ppo" if name == "clip_cov" else "reinforce", case, backend)[1])
    row = tokenrl.objective(name, **how, **of_parts, mean_advantages=mean_a, mean_logp=mean_logp)
    loss, gradients = 0.0, []
    for part in (slice(0, 2), slice(2, 6)):
        own = {key: x[part] for key, x in case.items()}
        value, gradient, _ = called(row, own, backend, normalizer=float(len(cells)))
        loss += value
        gradients.append(gradient)
    torch.testing.assert_close(loss, whole[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(gradients), whole[1], rtol=1e-12, atol=0)
