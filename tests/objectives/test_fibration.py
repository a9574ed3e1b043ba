"""FiberPO-Domain and APC-Obj: their formulas typed out in floats and loops, value and gradient, on every backend."""

import pytest
import torch
from by_loops import called, made, same
from cases import backends_to_test, device_of

import tokenrl

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())


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
