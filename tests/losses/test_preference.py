"""preference_loss: derivatives, properties, layouts, micro-batches."""

import math

import pytest
import torch
from preference_cases import P, T, batch
from torch._subclasses.fake_tensor import FakeTensorMode

import tokenrl
from tokenrl import preference_weights
from tokenrl.objectives.links import AlphaScore, ForwardKlScore, JsScore, OfLabels, Score

ROWS = list(tokenrl.PREFERENCES)
PAIRED = [name for name, row in tokenrl.PREFERENCES.items() if row.coupling == "pairs"]


def run(row, case):
    """(loss, metrics, gradients in what may have one)."""
    leaves = {name: case[name].detach().requires_grad_() for name in ("logp", "divergence") if name in case}
    loss, metrics = tokenrl.preference_loss(row, **case | leaves)
    return loss.detach(), metrics, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def same(found, expected, rtol=1e-10):
    for one, two in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=1e-13, equal_nan=True)
    for name, grad in found[2].items():
        assert grad.any()
        torch.testing.assert_close(grad, expected[2][name], rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("name", ROWS)
def test_every_derivative_is_that_of_its_value(name):
    """Of links and scores beside autograd's, then of the whole loss by differences."""
    row, g = tokenrl.PREFERENCES[name], torch.Generator().manual_seed(1)
    parameters = {"label_smoothing": 0.1} if "label_smoothing" in row.link.names else {}
    row = tokenrl.preference(row, **parameters)
    x = [-3 * torch.rand(9, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    if isinstance(row.link, OfLabels):
        weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7} if "desirable_weight" in row.link.names else {}
        link = tokenrl.preference(row, **weights).link
        value, *slopes = link.of_labelled(x[0], torch.arange(9) % 2 == 0, torch.tensor(0.2, dtype=torch.float64))
    else:
        value, *slopes = row.link.of(*x)
    for slope, true in zip(slopes, torch.autograd.grad(value.sum(), x[: len(slopes)]), strict=True):
        torch.testing.assert_close(slope, true, rtol=1e-12, atol=1e-14)
    case = batch(name)
    case["logp"] = torch.where(case["mask"], case["logp"], torch.nan)
    loss, _, grads = run(row, case)
    for kind, grad in grads.items():
        if kind == "divergence" and row.divergence_flow == "rejected":
            assert not grad[:P].any() and grad[P:].any()
            continue
        step = torch.randn(grad.shape, generator=g, dtype=torch.float64)
        sides = [tokenrl.preference_loss(row, **case | {kind: case[kind] + h * step})[0] for h in (1e-6, -1e-6)]
        assert not grad[~case["mask"]].any()
        torch.testing.assert_close((grad * step).sum(), (sides[0] - sides[1]) / 2e-6, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("score", [Score(), ForwardKlScore(), JsScore(), AlphaScore(0.5), AlphaScore(2.0)])
def test_scores(score):
    x = torch.linspace(-3, 3, 13, dtype=torch.float64).requires_grad_()
    value, slope = score.of(x)
    torch.testing.assert_close(slope, torch.autograd.grad(value.sum(), x)[0], rtol=1e-12, atol=0)
    near_one, _ = AlphaScore(1 + 1e-7).of(x)
    torch.testing.assert_close(near_one, AlphaScore(1.0).of(x)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in ROWS if tokenrl.PREFERENCES[name].coupling == "labels"])
def test_links_of_labels_are_fp64(name):
    """Written out in floats: nothing of a label is rounded to fp32."""
    link, base = tokenrl.PREFERENCES[name].link, torch.tensor(0.3, dtype=torch.float64)
    for desirable in (True, False):
        for x in (-2.7, 0.4):
            v = link.beta * (x - base.item())
            s = 1 / (1 + math.exp(-v))
            kto = 1 - s if desirable else s
            by_hand = -math.log(s if desirable else 1 - s) if name == "bco_unpaired" else kto
            slope = (s - desirable) if name == "bco_unpaired" else (-1 if desirable else 1) * s * (1 - s)
            given = torch.tensor([x], dtype=torch.float64), torch.tensor([desirable]), base
            found = [part.item() for part in link.of_labelled(*given)]
            assert found == pytest.approx([by_hand, link.beta * slope], rel=1e-13)


@pytest.mark.parametrize(
    "name", [name for name in ROWS if name not in ("orpo", "alphapo", "dpo_forward_kl", "dpo_alpha")]
)
def test_margins_of_thousands(name):
    """Are finite, value and slope, but where the formula has e^d itself."""
    link = tokenrl.PREFERENCES[name].link
    x = torch.tensor([-4e4, 4e4, -4e4, 4e4], dtype=torch.float64)
    if isinstance(link, OfLabels):
        found = link.of_labelled(x, x.roll(2) > 0, x.new_zeros(()))
    else:
        found = link.of(x, torch.tensor([4e4, -4e4, -4e4, 4e4], dtype=torch.float64))
    assert all(part.isfinite().all() for part in found)


@pytest.mark.parametrize("name", ROWS)
def test_packed_is_padded_and_masked_cells_may_hold_anything(name):
    case = batch(name)
    expected, mask = run(name, case), case["mask"]
    spoiled = {
        key: torch.where(mask, x, torch.nan) if torch.is_tensor(x) and x.shape == mask.shape and key != "mask" else x
        for key, x in case.items()
    }
    same(run(name, spoiled), expected)
    packed = {key: x[mask] if torch.is_tensor(x) and x.shape == mask.shape else x for key, x in case.items()}
    del packed["mask"]
    packed["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    loss, metrics, grads = run(name, packed)
    same((loss, metrics, grads), (*expected[:2], {key: grad[mask] for key, grad in expected[2].items()}))


@pytest.mark.parametrize("name", ROWS)
def test_pairs(name):
    """Sequences in any order, pairs in any order; swapped, margins change their sign; in labelled rows, order alone."""
    case = batch(name)
    loss, metrics, grads = run(name, case)
    order = torch.randperm(2 * P, generator=torch.Generator().manual_seed(2))
    moved = {key: x[order] if torch.is_tensor(x) and len(x) == 2 * P else x for key, x in case.items()}
    if "desirable" in case:
        again = run(name, moved)
        same(
            again, (loss, type(metrics)(*(x[order] if x.dim() else x for x in metrics)), {"logp": grads["logp"][order]})
        )
        return
    where, turn = order.argsort(), torch.tensor([2, 0, 1])
    pairs = torch.stack([where[:P], where[P:]], 1)[turn]
    again = run(name, moved | {"pairs": pairs})
    expected = type(metrics)(*(x[turn] if x.dim() else x for x in metrics))
    same(again, (loss, expected, {key: grad[order] for key, grad in grads.items()}))
    swapped = run(name, moved | {"pairs": pairs.flip(1)})[1]
    torch.testing.assert_close(swapped.margins, -again[1].margins)
    torch.testing.assert_close(swapped.accuracy, 1 - again[1].accuracy)


@pytest.mark.parametrize("name", ROWS)
def test_no_number_is_read(name):
    """Fake tensors have none, as a trace: whatever waits for a device raises."""
    case = batch(name)
    if "desirable" not in case:
        case["pairs"] = torch.tensor([[0, 3], [4, 1], [2, 5]])
    packed = {key: x.flatten() if torch.is_tensor(x) and x.shape == (2 * P, T) else x for key, x in case.items()}
    packed["cu_seqlens"] = torch.arange(0, 2 * P * T + 1, T)
    for given in (case, packed):
        with FakeTensorMode() as mode:
            fake = {key: mode.from_tensor(x) if torch.is_tensor(x) else x for key, x in given.items()}
            loss, metrics, grads = run(name, fake)
        assert loss.shape == metrics.accuracy.shape == () and grads["logp"].shape == given["logp"].shape


@pytest.mark.parametrize("name", PAIRED)
def test_equal_sequences(name):
    """Have no margin: log 2 of a sigmoid, and opposite gradients where a link sees the margin alone."""
    case = batch(name)
    for key in ("logp", "ref_logp", "mask", "divergence"):
        if key in case:
            case[key] = case[key][:P].repeat(2, 1)
    row = tokenrl.preference(name, nll=0.0)
    loss, metrics, grads = run(row, case)
    assert not metrics.margins.any() and metrics.accuracy == 0
    if type(row.link).__name__ == "Sigmoid" and row.link.gamma == 0:
        assert loss.item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-7)
        torch.testing.assert_close(grads["logp"][:P], -grads["logp"][P:])


@pytest.mark.parametrize("name", [name for name in ROWS if tokenrl.PREFERENCES[name].reference == "given"])
def test_what_both_models_think_alike_counts_for_nothing(name):
    case = batch(name)
    shift = torch.randn(2 * P, T, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = run(name, case)
    moved = {key: case[key] + shift for key in ("logp", "ref_logp")}
    if name == "aot":  # which sorts the margins of each model: of all alike
        moved = {key: case[key] + 0.5 for key in moved}
        moved["mask"] = case["mask"] = torch.ones_like(case["mask"])
        expected = run(name, case)
    same(run(name, case | moved), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["dpo", "simpo", "cpo", "tdpo2", "kto"])
def test_micro_batches_add_up(name):
    case = batch(name)
    expected = run(name, case)
    row, mask, parts = tokenrl.preference(name), case["mask"], []
    labelled = "desirable" in case
    for i in range(P):
        part = {key: x[i::P] if torch.is_tensor(x) and len(x) == 2 * P else x for key, x in case.items()}
        part["normalizer"] = 2 * P if labelled else P
        if row.nll:
            part["nll_normalizer"] = mask[:P].sum()
        parts.append(run(row, part))
    torch.testing.assert_close(sum(part[0] for part in parts), expected[0])
    for i, part in enumerate(parts):
        torch.testing.assert_close(part[2]["logp"], expected[2]["logp"][i::P])


def test_weights_of_pairs_and_tokens():
    case, weight = batch("dpo"), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    singles = [
        tokenrl.preference_loss("dpo", **{key: x[i::P] for key, x in case.items()})[0] * weight[i] for i in range(P)
    ]
    loss, _ = tokenrl.preference_loss("dpo", **case, pair_weight=weight)
    torch.testing.assert_close(loss, sum(singles) / P)
    tokens = torch.rand(2 * P, T, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    logp = case["logp"].requires_grad_()
    loss, _ = tokenrl.preference_loss("dpo", **case, token_weight=tokens)
    of_weight, of_logp = torch.autograd.grad(loss, (tokens, logp))
    ratio = (logp - case["ref_logp"]).detach()
    torch.testing.assert_close(of_weight * tokens.detach(), of_logp * ratio)  # both are dL/dx w (logp - ref_logp)
    x, mask = (tokens * ratio * case["mask"]).sum(1), case["mask"]
    by_hand = -torch.nn.functional.logsigmoid(0.1 * (x[:P] - x[P:])).mean()
    torch.testing.assert_close(of_weight, torch.autograd.grad(by_hand, tokens)[0])
    whole = preference_weights.ld_dpo_weights(logp, alpha=1.0, mask=mask)
    assert torch.equal(whole, mask.double())


def test_fp32_and_the_dtype_of_the_loss():
    case = {key: x.float() if torch.is_tensor(x) and x.dtype == torch.float64 else x for key, x in batch("dpo").items()}
    loss, metrics, grads = run("dpo", case)
    expected = run("dpo", {key: x.double() if x.is_floating_point() else x for key, x in case.items()})
    assert loss.dtype == grads["logp"].dtype == torch.float32 and metrics.margins.dtype == torch.float64
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-7, atol=0)
    torch.testing.assert_close(grads["logp"].double(), expected[2]["logp"], rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", ["dpo_js", "orpo", "kto"])
def test_twice(name):
    """The derivatives that links state have derivatives of their own."""
    case = {key: x[:, 1:4] if torch.is_tensor(x) and x.dim() == 2 else x for key, x in batch(name).items()}
    case["logp"].requires_grad_()
    weight = torch.rand(2 * P, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()

    def loss(logp, token_weight):
        return tokenrl.preference_loss(name, **case | {"logp": logp}, token_weight=token_weight)[0]

    assert torch.autograd.gradgradcheck(loss, (case["logp"], weight))


@pytest.mark.parametrize("name", ["dpo", "kto", "ipo_sum"])
def test_torch_func_differentiates_once_and_twice(name):
    case = batch(name)
    logp = case.pop("logp").detach()

    def loss(x):
        return tokenrl.preference_loss(name, x, **case)[0]

    leaf = logp.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(logp), grad.detach())
    found = torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(logp)
    assert second.any()
    torch.testing.assert_close(found, second)


def test_constants_of_inference_mode():
    for name, more in (("tdpo2", {"pair_weight": torch.ones(P)}), ("kto", {"normalizer": torch.tensor(3.0)})):
        case = batch(name) | more
        if name == "tdpo2":
            case["pairs"] = torch.tensor([[0, 3], [1, 4], [2, 5]])
        expected = run(name, case)
        with torch.inference_mode():
            made = {key: x.clone() for key, x in case.items() if key not in ("logp", "divergence")}
        same(run(name, case | made), expected)
