"""Objectives whose tokens or sequences meet in the whole batch, and gates with one value per token: their formulas
typed out in floats and loops, value and gradient, on every backend."""

import math

import pytest
import torch
from cases import backends_to_test, batch, device_of, gates_under_test, packed

import tokenrl
from tokenrl.objectives.gates.bounded import PpoNtp, Ratio
from tokenrl.objectives.gates.weighted import Cispo, Quadratic, Reinforce

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())


def made(seed=0, **how):
    """(a batch without segments and weights, its valid tokens as (row, column))."""
    case = batch(seed, **how)
    for name in ("segment_ids", "token_weight"):
        del case[name]
    return case, [tuple(cell) for cell in case["mask"].nonzero().tolist()]


def called(objective, case, backend, **more):
    """(loss, gradient, metrics)."""
    case = {name: x.to(device_of(backend)) for name, x in case.items()} | more
    logp = case.pop("logp").requires_grad_()
    loss, metrics = tokenrl.policy_loss(
        objective, logp, case.pop("old_logp"), case.pop("advantages"), backend=backend, **case
    )
    return loss.detach().cpu(), torch.autograd.grad(loss, logp)[0].cpu(), metrics


def same(found, loss, gradient):
    torch.testing.assert_close(found[0], torch.tensor(loss, dtype=torch.float64), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(found[1], gradient, rtol=1e-11, atol=1e-14)


def ratios(case, cells):
    return {cell: (case["logp"][cell] - case["old_logp"][cell]).item() for cell in cells}


def clipped(r, a, low=0.8, high=1.2):
    """(PPO's loss, its slope in the log ratio)."""
    active = r <= high if a > 0 else r >= low
    return max(-a * r, -a * min(max(r, low), high)), -a * r * active


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


@EVERY_BACKEND
def test_hapo(backend):
    case, cells = made(5)
    g = torch.Generator().manual_seed(1)
    score = torch.rand(case["mask"].shape, generator=g, dtype=torch.float64) * 2 - 1
    d, loss, gradient = ratios(case, cells), 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64)
    for cell in cells:
        a, h, r = case["advantages"][cell[0]].item(), score[cell].item(), math.exp(d[cell])
        low, high = (0.2 * (1 - 0.7 * h), 0.25) if h <= 0 else (0.2, 0.25 * (1 + 0.7 * h))
        inside = 1 - low / 2 < r < 1 + high / 2
        if (h > 0 and not inside) or (h <= 0 and inside):
            a *= 1 + 0.9 * h
        value, slope = clipped(r, a, 1 - low, 1 + high)
        if a < 0 and value > -a * 1.5:
            value, slope = -a * 1.5, 0.0
        loss += value / len(cells)
        gradient[cell] = slope / len(cells)
    row = tokenrl.objective(
        "hapo", eps_low=0.2, eps_high=0.25, dual=1.5, alpha=0.7, beta=0.9, score=score.to(device_of(backend))
    )
    same(called(row, case, backend), loss, gradient)


@EVERY_BACKEND
def test_rmt(backend):
    """Two sets of tokens in one pass: reinforcement on one, next-token prediction on the other."""
    case, cells = made(6)
    rl = torch.arange(case["mask"].shape[1]) % 2 == 0
    case["advantages"] = torch.where(rl, case["advantages"][:, None], 0.0)
    ntp = (0.1 * (~rl).double()).expand(case["mask"].shape).contiguous()
    d, loss, gradient = ratios(case, cells), 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64)
    for cell in cells:
        value, slope = clipped(math.exp(d[cell]), case["advantages"][cell].item())
        if not rl[cell[1]]:
            assert slope == 0
            value, slope = -0.1 * case["logp"][cell].item(), -0.1
        loss += value / len(cells)
        gradient[cell] = slope / len(cells)
    row = tokenrl.objective("rmt", ntp=ntp.to(device_of(backend)))
    same(called(row, case, backend), loss, gradient)
    # A plain sum over the tokens to predict: under any aggregation, each of them as it is.
    for mode in ("token-mean", "seq-mean-token-mean"):
        found = called(tokenrl.objective(row, ntp_reduction="sum", aggregation=mode), case, backend)
        plain = called(tokenrl.objective(row, ntp=0.0, aggregation=mode), case, backend)
        valid = case["mask"]
        added = torch.where(valid, -ntp * case["logp"], 0).sum()
        same(found, (plain[0] + added).item(), plain[1] - torch.where(valid, ntp, 0))


@EVERY_BACKEND
def test_topr_split_by_the_reward(backend):
    """ROLL: a row that was rewarded is not importance-weighted, whatever the sign of its advantage."""
    case, cells = made(9)
    case["advantages"][2] = -0.7
    reward = torch.tensor([1.0, 0.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    d, loss, gradient = ratios(case, cells), 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64)
    for cell in cells:
        a = case["advantages"][cell[0]].item() / len(cells)
        w = 1.0 if reward[cell[0]] > 0 else min(math.exp(d[cell]), 1.0)
        loss += -w * a * case["logp"][cell].item()
        gradient[cell] = -w * a
    score = reward[:, None].expand(case["mask"].shape).contiguous().to(device_of(backend))
    row = tokenrl.objective("topr_roll", score=score, aggregation="token-mean")
    found = called(row, case, backend)
    same(found, loss, gradient)
    assert found[2].clip_low == pytest.approx(sum(reward[i] <= 0 and d[i, j] > 0 for i, j in cells) / len(cells))
    plain = called(tokenrl.objective(row, score=None), case, backend)
    assert not torch.equal(plain[1], found[1])


@EVERY_BACKEND
def test_dppo_with_a_given_divergence(backend):
    case, cells = made(7)
    g = torch.Generator().manual_seed(2)
    far = torch.rand(case["mask"].shape, generator=g, dtype=torch.float64) * 0.3
    d, loss, gradient = ratios(case, cells), 0.0, torch.zeros(case["mask"].shape, dtype=torch.float64)
    dropped = 0
    for cell in cells:
        a, r, logp = case["advantages"][cell[0]].item(), math.exp(d[cell]), case["logp"][cell].item()
        outwards = r > 1 if a > 0 else r < 1
        w = 0.0 if outwards and far[cell] > (0.1 if a > 0 else 0.2) else min(r, 1.3)
        dropped += w == 0
        loss += -w * a * logp / len(cells)
        gradient[cell] = -w * a / len(cells)
    assert 0 < dropped < len(cells)
    row = tokenrl.objective(
        "dppo_topk", eps_low=0.2, eps_high=0.1, ceiling=1.3, divergence=far.to(device_of(backend)),
        aggregation="token-mean",
    )  # fmt: skip
    same(called(row, case, backend), loss, gradient)


@EVERY_BACKEND
def test_cppo_with_a_given_divergence_is_dppo_without_a_budget(backend):
    """delta_b so large that no prefix binds, w_min = 1: Z_t <= delta alone decides."""
    case, _ = made(8)
    far = (case["logp"].exp() - case["old_logp"].exp()).abs()
    row = tokenrl.objective(
        "cppo", delta=0.05, delta_b=1e9, w_min=1.0, quantile=None, divergence=far.to(device_of(backend))
    )
    found = called(row, case, backend)
    mask, d = case["mask"], torch.where(case["mask"], case["logp"] - case["old_logp"], 0)
    a = case["advantages"][:, None]
    kept = mask & ((a * d <= 0) | (far <= 0.05))
    n = mask.sum()
    loss = torch.where(kept, -a * d.exp(), 0).sum() / n
    same(found, loss.item(), torch.where(kept, -a * d.exp(), 0) / n)
    assert 0 < kept.sum() < n


@EVERY_BACKEND
@pytest.mark.parametrize("form", ["gmpo", "hmpo", "fiberpo"])
def test_a_gate_of_logp_beside_a_form_that_replaces_the_ratio(form, backend):
    """The form's ratio is the weight, the gradient is that of the log-prob itself."""
    case, cells = made(4)
    case["advantages"][1] = 0.5
    valid, a = case["mask"], case["advantages"][:, None]
    plain = called(tokenrl.objective(form, gate=Reinforce(), aggregation="token-mean"), case, backend)
    expected = torch.where(valid, -a * case["logp"], 0).sum().item() / len(cells)
    same(plain, expected, torch.where(valid, -a / len(cells), 0))
    weighed = called(tokenrl.objective(form, gate=Cispo(), aggregation="token-mean"), case, backend)
    ratio = called(tokenrl.objective(form, gate=Ratio(), aggregation="token-mean"), case, backend)
    # Of one ratio for all tokens of a row, -A r logp has the sum of -A r for its slope.
    of_row = [torch.where(valid, x, 0).sum(1) for x in (weighed[1], -a * torch.ones_like(case["logp"]) / len(cells))]
    r = torch.where(valid.any(1), of_row[0] / of_row[1], 0)
    loss = (of_row[1] * r).sum()
    torch.testing.assert_close(ratio[0], loss, rtol=1e-9, atol=1e-12)
    if form != "fiberpo":
        same(weighed, torch.where(valid, -a * r[:, None] * case["logp"], 0).sum().item() / len(cells),
             torch.where(valid, -a * r[:, None] / len(cells), 0))  # fmt: skip
    for gate in (Quadratic(), PpoNtp()):
        with pytest.raises(ValueError, match=f"^gate: got {type(gate).__name__}, whose loss has a slope in the ratio"):
            tokenrl.objective(form, gate=gate)


def test_slopes_are_what_gates_say():
    s, x, logp = (torch.full((1,), v, dtype=torch.float64, requires_grad=True) for v in (0.03, 0.04, -1.0))
    for name, gate in gates_under_test().items():
        value = gate.value(s, x, logp, torch.full((1,), -0.7, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        found = torch.autograd.grad(value, (s, x, logp), allow_unused=True)
        found = [part is not None and bool(part.any()) for part in found]
        assert ("s" in gate.slopes, "logp" in gate.slopes) == (found[0] or found[1], found[2]), name


def gated(x, bound, n):
    """FiberPO's g of a number of either sign."""
    if abs(x) <= bound:
        return x
    sign = 1 if x > 0 else -1
    return sign * ((n + 1) * bound - n * abs(x)) if abs(x) < (1 + 1 / n) * bound else 0 * x


def average(found):
    return sum(found) / len(found)


def fibration(x, groups, domains, bounds):
    """The ratio of each token, x: (row, column) -> log ratio; the three levels written out, row by row."""
    c, eps = bounds[:2], bounds[2]
    rows = sorted({i for i, _ in x})
    own = {i: [cell for cell in x if cell[0] == i] for i in rows}
    s = {(i, k): average([max(sign * x[cell], 0 * x[cell]) for cell in own[i]]) for i in rows for k, sign in SIGNS}
    peers = {i: {"group": [j for j in rows if groups[j] == groups[i]],
                 "domain": [j for j in rows if domains[j] == domains[i]]} for i in rows}  # fmt: skip
    ratio = {}
    for i in rows:
        base, size = 0, {of: sum(len(own[j]) for j in peers[i][of]) for of in ("group", "domain")}
        for k, sign in SIGNS:
            s_g, s_d = (average([s[j, k] for j in peers[i][of]]) for of in ("group", "domain"))
            parts = ((s_d, size["domain"]), (s_g - s_d, size["group"]), (s[i, k] - s_g, len(own[i])))
            base = base + sign * sum(gated(part, c[k], n) for part, n in parts)
        for cell in own[i]:
            k, sign = SIGNS[0] if x[cell] >= 0 else SIGNS[1]
            num, den = x[cell] - sign * s[i, k], -sign * s[i, 1 - k]
            ratio[cell] = (base + num.clamp(-eps, eps) - den.clamp(-eps, eps)).exp()
    return ratio


SIGNS = ((0, 1), (1, -1))


def differentiated(case, cells, loss_of):
    """(loss, gradient, of loss_of(cell -> log ratio)) by autograd on numbers."""
    logp = {cell: case["logp"][cell].clone().requires_grad_() for cell in cells}
    loss = loss_of({cell: logp[cell] - case["old_logp"][cell] for cell in cells})
    gradient = torch.zeros(case["mask"].shape, dtype=torch.float64)
    for cell, slope in zip(cells, torch.autograd.grad(loss, list(logp.values()), allow_unused=True), strict=True):
        gradient[cell] = 0 if slope is None else slope
    return loss.item(), gradient


@EVERY_BACKEND
@pytest.mark.parametrize("bounds", [(0.12, 0.05, 0.04), (0.062, 0.081, 0.2), (9.0, 9.0, 9.0)])
def test_fiberpo_domain(bounds, backend):
    case, cells = made(3, rows=8)
    groups = case["group_ids"].tolist()
    domains = [0 if g == 7 else 1 for g in groups]
    a, n = case["advantages"].tolist(), {i: sum(cell[0] == i for cell in cells) for i in range(8)}
    rows = sum(count > 0 for count in n.values())

    def loss_of(x):
        ratio = fibration(x, groups, domains, bounds)
        return sum(-a[cell[0]] * ratio[cell] / n[cell[0]] / rows for cell in cells)

    domain = torch.tensor(domains)[:, None].expand(case["mask"].shape).double().to(device_of(backend))
    names = dict(zip(("c_pos", "c_neg", "eps"), bounds, strict=True))
    row = tokenrl.objective("fiberpo_domain", domain=domain, **names)
    same(called(row, case, backend), *differentiated(case, cells, loss_of))
    if bounds[0] == 9.0:
        same(called(tokenrl.objective(row, form=None), case, backend), *differentiated(case, cells, loss_of))
    whole = called(tokenrl.objective("fiberpo_domain", **names), case, backend)
    domains = [0] * 8
    same(whole, *differentiated(case, cells, loss_of))
    del case["group_ids"]
    with pytest.raises(ValueError, match="^group_ids: got None, accepted: one integer per sequence"):
        called(row, case, backend)


def test_fiberpo_domain_of_one_row_to_a_group_and_domain_is_fiberpo_with_its_gate_once():
    """S - S_G and S_G - S_D are 0."""
    case, _ = made(4)
    case["group_ids"] = torch.arange(5)
    domain = torch.arange(5.0)[:, None].expand(case["mask"].shape).double()
    found = called(tokenrl.objective("fiberpo_domain", domain=domain), case, "reference")
    expected = called("fiberpo", case, "reference")
    same(found, expected[0].item(), expected[1])


@EVERY_BACKEND
@pytest.mark.parametrize("delta", [0.17, 0.25, 9.0])
def test_apc_obj(delta, backend):
    """Tokens of one column were sampled from one state."""
    case, cells = made(3, rows=8)
    a, clipped = case["advantages"].tolist(), set()

    def loss_of(x, apart=False):
        loss = 0
        for cell in cells:
            peers = [other for other in cells if other[1] == cell[1]]
            budget = len(peers) * delta - sum((x[o].exp() - 1).abs() for o in peers if o != cell)
            bound = (
                torch.tensor(delta, dtype=torch.float64)
                if apart
                else torch.as_tensor(budget, dtype=torch.float64).clamp(min=0)
            )
            change = x[cell].exp() - 1
            clipped.add((bool(change < -bound), bool(change > bound)))
            kept = bound if change > bound else -bound if change < -bound else change
            loss = loss - a[cell[0]] * (1 + kept) / len(cells)
        return loss

    state = torch.arange(case["mask"].shape[1]).expand(case["mask"].shape).double().to(device_of(backend))
    row = tokenrl.objective("apc_obj", delta=delta, state=state.contiguous())
    same(called(row, case, backend), *differentiated(case, cells, loss_of))
    assert len(clipped) == (1 if delta == 9.0 else 3)
    row = tokenrl.objective("apc_obj", delta=delta)
    same(called(row, case, backend), *differentiated(case, cells, lambda x: loss_of(x, apart=True)))
