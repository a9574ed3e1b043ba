"""preference_weights: packed is padded, pairs anywhere, masked cells, constants of the formulas."""

import pytest
import torch
from preference_cases import P, T

import tokenrl
from tokenrl import preference_weights as weights

DRAW = torch.Generator().manual_seed(0)
MASK = torch.rand(2 * P, T, generator=DRAW) > 0.3
MASK[:, 2] = True


def draw(*more):
    return -torch.rand(2 * P, T, *more, generator=DRAW, dtype=torch.float64)


MARGINS = torch.tensor([0.4, -1.0, 2.0], dtype=torch.float64)
CALLS = {
    "wpo_weights": {"logp": draw(), "log_sum_sq_probs": draw()},
    "ld_dpo_weights": {"logp": draw(), "alpha": 0.3},
    "tgdpo_weights": {"aligned_logp": draw(), "ref_logp": draw()},
    "cdpo_weights": {"score": -draw(), "chosen": "score"},
    "mapo_weights": {"activation": draw(4)},
    "tab_po_weights": {"weight": -draw()},
    "tab_po_barrier": {"logp": draw(), "weight": -draw()},
    "t_reg_term": {"logp": draw(), "better_logp": draw(), "worse_logp": draw(), "margins": MARGINS},
    "sparsepo_l1": {"weight": draw()},
}
WITHOUT_PAIRS = ("mapo_weights", "tab_po_weights")


def changed(given, change):
    return {key: change(x) if torch.is_tensor(x) and x.dim() > 1 else x for key, x in given.items()}


@pytest.mark.parametrize("name", CALLS)
def test_layouts_and_pairs(name):
    function, given = getattr(weights, name), CALLS[name]
    expected = function(**given, mask=MASK)
    spoiled = changed(given, lambda x: torch.where(MASK if x.dim() == 2 else MASK[..., None], x, torch.nan))
    torch.testing.assert_close(function(**spoiled, mask=MASK), expected, rtol=0, atol=0)
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int64), MASK.sum(1).cumsum(0)])
    packed = function(**changed(given, lambda x: x[MASK]), cu_seqlens=boundaries)
    per_token = expected.shape == MASK.shape
    torch.testing.assert_close(packed, expected[MASK] if per_token else expected)
    if per_token:
        assert not expected[~MASK].any() and expected[MASK].all() == (name != "mapo_weights")
    if name in WITHOUT_PAIRS:
        return
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    where = order.argsort()
    pairs = torch.stack([where[:P], where[P:]], 1)
    moved = function(**changed(given, lambda x: x[order]), mask=MASK[order], pairs=pairs)
    torch.testing.assert_close(moved, expected[order] if per_token else expected)


def test_ld_dpo_by_loops():
    found = weights.ld_dpo_weights(draw(), alpha=0.3, mask=MASK)
    for i in range(2 * P):
        shared = min(MASK[i].sum(), MASK[(i + P) % (2 * P)].sum())
        seen = 0
        for t in range(T):
            seen += MASK[i, t].item()
            assert found[i, t] == (0.0 if not MASK[i, t] else 1.0 if seen <= shared else 0.3)
    assert (found == 0.3).any()


def test_the_barriers_gradient_is_that_of_chosen_tokens_below_tau():
    given = CALLS["tab_po_barrier"]
    logp = given["logp"].clone().requires_grad_()
    (grad,) = torch.autograd.grad(weights.tab_po_barrier(logp, given["weight"], tau=0.6, mask=MASK), logp)
    open_gate = MASK & (given["logp"].exp() < 0.6)
    open_gate[P:] = False
    empty = draw()[:0].requires_grad_()
    assert torch.autograd.grad(weights.tab_po_barrier(empty, empty.detach()), empty)[0].shape == empty.shape
    assert weights.tab_po_barrier(empty, empty.detach()) == 0
    assert open_gate.any() and torch.equal(grad != 0, open_gate) and (grad <= 0).all()


@pytest.mark.parametrize("statistic", ["sum", "mean"])
def test_t_reg(statistic):
    """By its formula; and of sums, with DPO, the coefficients -beta w (1 + alpha r_t) and beta w (1 - alpha r_t)."""
    given, beta, alpha = CALLS["t_reg_term"], 0.2, 0.5
    logp, ref = given["logp"].clone().requires_grad_(), draw()
    loss, metrics = tokenrl.preference_loss(tokenrl.preference("dpo", beta=beta), logp, ref, mask=MASK)
    ours = weights.t_reg_term(
        **given | {"logp": logp, "margins": metrics.margins}, beta=beta, statistic=statistic, mask=MASK
    )
    r = (given["better_logp"] - given["worse_logp"]).sigmoid() - 0.5
    of_tokens = torch.where(MASK, -beta * r * logp, 0).sum(1) / (1 if statistic == "sum" else MASK.sum(1))
    w = (-metrics.margins).sigmoid()
    theirs = (w * (of_tokens[:P] + of_tokens[P:])).mean()
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (ours, theirs))
    assert expected.any()
    torch.testing.assert_close(found, expected)
    if statistic == "sum":
        (total,) = torch.autograd.grad(loss + alpha * ours, logp)
        side = torch.tensor([1.0] * P + [-1.0] * P)[:, None]
        coef = -side * beta * w.repeat(2)[:, None] * (1 + alpha * side * r) / P
        torch.testing.assert_close(total, torch.where(MASK, coef, 0))


def test_sparsepos_l1():
    """Of exact zeros the gradient is 0: a mask that a ReLU has closed stays so."""
    weight = torch.where(draw() < -0.5, 0, -draw()).requires_grad_()
    value = weights.sparsepo_l1(torch.where(MASK, weight, torch.nan), mask=MASK)
    torch.testing.assert_close(value, weight.detach()[MASK].sum() / P)
    (grad,) = torch.autograd.grad(value, weight)
    assert torch.equal(grad != 0, MASK & (weight > 0)) and (grad[grad != 0] == 1 / P).all() and (weight == 0).any()


def test_wrong_calls():
    for call, message in (
        (lambda: weights.cdpo_weights(-draw(), chosen="two"), "^chosen: got 'two', accepted: one, score"),
        (lambda: weights.mah_dpo_weights(torch.tensor([0, 2]), 2), "^dimension: got 0 to 2, accepted: numbers of head"),
        (
            lambda: weights.mah_dpo_weights(torch.tensor([0, 1]), 2.5),
            "^heads: got 2.5, accepted: a whole number",
        ),
        (lambda: weights.mah_dpo_weights(torch.tensor([0, 1]), float("inf")), "^heads: got inf, accepted: a whole"),
        (lambda: weights.ld_dpo_weights(draw(), alpha=1.5), "^alpha: got 1.5"),
        (lambda: weights.tab_po_barrier(draw(), draw(), per="pair"), "^per: got 'pair'"),
        (lambda: weights.t_reg_term(*[draw()] * 3, MARGINS, statistic="max"), "^statistic: got 'max', accepted: sum"),
        (lambda: weights.t_reg_term(*[draw()] * 3, MARGINS[:2]), r"^margins: got shape \[2\], accepted: shape \[3\]"),
        (lambda: weights.wpo_weights(draw()[:3], draw()[:3]), "^pairs: got None.*3 sequences have no halves"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
