"""distillation_loss and linear_distillation_loss: the formula, gradients, chunks, work, GKD of TRL itself, errors."""

import pytest
import torch
from cases import backends_to_test, device_of, interpreted, kernel_backends, thinned
from linear_cases import pair_budget

import tokenrl
from tokenrl.ops import backends

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
KERNELS = pytest.mark.parametrize("backend", kernel_backends())
B, T, D, E, V = 3, 40, 6, 9, 31


def batch(device="cpu", dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (B, T, D), "weight": (V, D), "bias": (V,), "other_hidden": (B, T, E), "other_weight": (V, E)}
    case = {name: torch.randn(*shape, generator=g, dtype=torch.float64) / 2 for name, shape in shapes.items()}
    case = {name: x.to(device, dtype) for name, x in case.items()}
    more = {"mask": torch.rand(B, T, generator=g) > 0.3, "token_weight": torch.rand(B, T, generator=g, dtype=dtype)}
    more["token_weight"][0, :4] = 0
    return case, {name: x.to(device) for name, x in more.items()}


def by_hand(case, mask, token_weight, temperature, power, kind):
    """Of a mean over tokens, in torch; power: of the temperature."""
    z = (case["hidden"] @ case["weight"].t() + case["bias"]) / temperature
    y = case["other_hidden"] @ case["other_weight"].t() / temperature
    p, r = z.log_softmax(-1), y.log_softmax(-1)
    value = {
        "forward_kl": lambda: (r.exp() * (r - p)).sum(-1),
        "reverse_kl": lambda: (p.exp() * (p - r)).sum(-1),
        "jsd": lambda: _jsd(p, r, 0.5),
    }[kind]()
    return (torch.where(mask, token_weight * value, 0).sum() / mask.sum()) * temperature**power


def _jsd(p, r, beta):
    m = ((1 - beta) * p.exp() + beta * r.exp()).log()
    return (beta * r.exp() * (r - m) + (1 - beta) * p.exp() * (p - m)).sum(-1)


def leaves(case):
    return [case[name].requires_grad_() for name in ("hidden", "weight", "bias")]


ROWS = [("kd", "forward_kl", 2), ("reverse_kd", "reverse_kl", 0), ("gkd", "jsd", 0)]
WAYS = [(*row, rows, layout) for row in ROWS for rows in (None, 25) for layout in ("padded", "packed")]


@pytest.mark.parametrize(
    "row,kind,power,rows,layout,backend", [(*way, b) for b in backends_to_test() for way in thinned(WAYS, b)]
)
def test_from_hidden_states_and_from_logits(layout, rows, row, kind, power, backend):
    case, more = batch(device_of(backend))
    at = leaves(case)
    expected = by_hand(case, **more, temperature=1.7, power=power, kind=kind)
    truth = torch.autograd.grad(expected, at)
    if layout == "packed":
        more = {name: x.flatten() for name, x in more.items()} | {
            "cu_seqlens": torch.tensor([0, 30, 30, B * T], device=at[0].device)
        }
        case = {name: x.flatten(0, 1) if name.endswith("hidden") else x for name, x in case.items()}
    how = more | {"temperature": 1.7, "backend": backend}
    logits = case["hidden"] @ case["weight"].t() + case["bias"]
    other = case["other_hidden"] @ case["other_weight"].t()
    budget = None if rows is None else pair_budget(rows, E, V, 8)
    for loss, values in (
        tokenrl.distillation_loss(row, logits, other, **how),
        tokenrl.linear_distillation_loss(row, **case, **how, memory_budget=budget),
    ):
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        assert not values[~more["mask"]].any() and not values.requires_grad
        for got, wanted in zip(torch.autograd.grad(2 * loss, at), truth, strict=True):
            assert wanted.any()
            torch.testing.assert_close(got, 2 * wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "kind,backend", [(k, b) for b in backends_to_test() for k in (["jsd"] if interpreted(b) else tokenrl.DIVERGENCES)]
)
def test_linear_token_divergence(kind, backend):
    """Each token's divergence, weighed by what comes from above, beside that of the logits; the chunks are written once
    for all kinds, and one takes the interpreter a quarter of a minute."""
    case, more = batch(device_of(backend))
    at = leaves(case)
    weights = more["token_weight"]
    how = {"row_mask": more["mask"], "softcap": 5.0, "other_temperature": 0.8, "backend": backend}
    logits = case["hidden"] @ case["weight"].t() + case["bias"]
    other = case["other_hidden"] @ case["other_weight"].t()
    expected = tokenrl.token_divergence(logits, other, kind, **how)
    names = ("hidden", "weight", "other_hidden", "other_weight")
    found = tokenrl.linear_token_divergence(*(case[name] for name in names), kind, bias=case["bias"], **how)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad((weights * value).sum(), at) for value in (found, expected)]
    for got, wanted in zip(*grads, strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@KERNELS
def test_frozen_parts_get_no_gradient_and_tokens_without_weight_enter_no_gemm(backend, monkeypatch):
    case, more = batch(device_of(backend))
    case["hidden"].requires_grad_()
    case["hidden"].data[~more["mask"]] = torch.nan
    case["other_hidden"].data[0, :4] = torch.nan  # they weigh nothing
    rows = []
    real = backends.BACKENDS[backend].ops.divergence
    name = backends.BACKENDS[backend].namespace

    class Counting:
        def __getattr__(self, op):
            if op == "divergence":
                return lambda logits, *rest: rows.append(len(logits)) or real(logits, *rest)
            return getattr(getattr(torch.ops, name), op)

    from tokenrl.ops.linear import divergence

    run = divergence.run
    monkeypatch.setattr(divergence, "run", lambda ops, *rest: run(Counting(), *rest))
    loss, _ = tokenrl.linear_distillation_loss("kd", **case, **more, backend=backend)
    (grad,) = torch.autograd.grad(loss, case["hidden"])
    pays = more["mask"] & (more["token_weight"] != 0)
    assert sum(rows) == pays.sum() and loss.isfinite() and grad[pays].all() and not grad[~pays].any()


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_of_the_dtype_of_a_model(dtype, backend):
    """Beside the loss of the same logits, rounded as the model's own head rounds them."""
    case, more = batch(device_of(backend), dtype)
    more["token_weight"] = more["token_weight"].float()
    at = leaves(case)
    logits = torch.nn.functional.linear(case["hidden"], case["weight"], case["bias"])
    other = torch.nn.functional.linear(case["other_hidden"], case["other_weight"])
    expected, _ = tokenrl.distillation_loss("gkd", logits, other, **more, backend=backend)
    found, _ = tokenrl.linear_distillation_loss("gkd", **case, **more, backend=backend)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    for got, wanted in zip(*(torch.autograd.grad(loss, at) for loss in (found, expected)), strict=True):
        assert got.dtype == dtype and wanted.any()
        size = wanted.abs().max().item()
        torch.testing.assert_close(got, wanted, rtol=0, atol=size * (4e-2 if dtype == torch.bfloat16 else 1e-5))


@EVERY_BACKEND
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl_gkd(beta, backend):
    """TRL's own function on the same logits, in TRL's orientation."""
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="trl is not installed").GKDTrainer
    case, more = batch(device_of(backend))
    logits = (case["hidden"] @ case["weight"].t()).requires_grad_()
    other = case["other_hidden"] @ case["other_weight"].t()
    labels = torch.where(more["mask"], 1, -100)
    expected = trainer.generalized_jsd_loss(logits, other, labels=labels, beta=beta, temperature=0.9)
    row = {0.0: "forward_kd", 1.0: "reverse_kd"}.get(beta) or tokenrl.distillation("gkd", beta=beta)
    found, _ = tokenrl.distillation_loss(row, logits, other, mask=more["mask"], temperature=0.9, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    got, wanted = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    assert wanted.any()
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-14)


@EVERY_BACKEND
def test_aggregations_and_temperatures_per_token(backend):
    case, more = batch(device_of(backend))
    logits, other = case["hidden"] @ case["weight"].t(), case["other_hidden"] @ case["other_weight"].t()
    temperature = torch.rand(B, T, device=logits.device) + 0.5
    loss, values = tokenrl.distillation_loss(
        "kd", logits, other, **more, aggregation="seq-mean-token-mean", normalizer=7.0, temperature=temperature,
        backend=backend,
    )  # fmt: skip
    weights = tokenrl.aggregation_weights("seq-mean-token-mean", mask=more["mask"], normalizer=7.0).to(values.device)
    expected = (weights * more["token_weight"] * temperature**2 * values).sum()
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-6, atol=0)


CASE, MORE = batch()
ERRORS = {
    "objective": ({"objective": "gdk"}, "objective: got 'gdk', accepted: kd, .* Did you mean 'gkd'"),
    "vocabulary": ({"other_weight": CASE["other_weight"][1:]}, r"other_hidden: got a head of logits \[3, 40, 30\]"),
    "teacher": (
        {"other_weight": CASE["other_weight"].clone().requires_grad_()},
        "other_weight: got a tensor that requires grad, accepted: a frozen head",
    ),
    "dtypes": (
        {name: CASE[name].half() for name in ("other_hidden", "other_weight")},
        "compute_dtype: got None of heads in float64 and float16, accepted: one of these",
    ),
    "groups": ({"aggregation": "balanced"}, "aggregation: got 'balanced', accepted: a mode without groups"),
    "budget": ({"memory_budget": 100}, "memory_budget: got 100 bytes, accepted: more"),
    "mask": ({"mask": MORE["mask"][1:]}, "mask: got shape"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenrl.linear_distillation_loss(**{"objective": "kd"} | CASE | MORE | changes)


def test_errors_of_a_row():
    with pytest.raises(ValueError, match="^parameter of 'gkd': got 'betta', .* Did you mean 'beta'"):
        tokenrl.distillation("gkd", betta=0.1)
    with pytest.raises(ValueError, match="^beta: got 1.5, accepted: a number above 0 and below 1"):
        tokenrl.distillation("gkd", beta=1.5)
    with pytest.raises(ValueError, match="^aggregation: got 'mean', accepted: token-mean"):
        tokenrl.distillation("gkd", aggregation="mean")
