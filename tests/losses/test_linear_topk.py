"""linear_topk_distillation_loss: the loss and gradients of the list's log-probs, chunks, masks, work, errors."""

import pytest
import torch
from cases import backends_to_test, device_of, kernel_backends

import tokenrl
from tokenrl.ops.linear import one_pass

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
B, T, D, V, K = 2, 9, 5, 31, 4


def batch(device="cpu", dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (B, T, D), "weight": (V, D), "bias": (V,)}
    case = {name: torch.randn(*s, generator=g, dtype=torch.float64).to(device, dtype) for name, s in shapes.items()}
    ids = torch.stack([torch.randperm(V, generator=g)[:K] for _ in range(B * T)]).view(B, T, K)
    other = torch.randn(B, T, V, generator=g, dtype=torch.float64).log_softmax(-1).gather(-1, ids)
    more = {"mask": torch.rand(B, T, generator=g) > 0.3, "token_weight": torch.rand(B, T, generator=g) + 0.1}
    more["token_weight"][0, :2] = 0
    return (
        case,
        {"ids": ids.to(device), "other_logp_topk": other.to(device)},
        {n: x.to(device) for n, x in more.items()},
    )


def leaves(case):
    return [x.requires_grad_() for x in case.values()]


OPTIONS = {
    "tail": ("kd", {"temperature": 1.7}),
    "renormalised": ("reverse_kd", {"rest": "renormalised", "softcap": 3.0, "aggregation": "seq-mean-token-mean"}),
    "truncated": ("gkd", {"rest": "truncated", "logp_floor": -3.0, "limits": (0, 1.0), "normalizer": 5.0}),
    "zero_outside": ("reverse_kd", {"rest": "zero_outside", "logit_scale": 0.5}),
}
OF_HEAD = ("temperature", "softcap", "logit_scale")


@EVERY_BACKEND
@pytest.mark.parametrize("name,rows", zip(OPTIONS, [None, 4, 4, None], strict=True))
def test_it_is_the_loss_of_the_lists(name, rows, backend):
    case, lists, more = batch(device_of(backend))
    objective, options = OPTIONS[name]
    at = leaves(case)
    topk_mask = lists["ids"] % 5 > 0
    logits = case["hidden"] @ case["weight"].t() + case["bias"]
    of_head = {key: value for key, value in options.items() if key in OF_HEAD}
    stats = tokenrl.token_logprobs(logits, lists["ids"], **of_head, backend="reference")
    rest = {key: value for key, value in options.items() if key not in ("softcap", "logit_scale")} | more
    rest |= {"entropy": stats.entropy} if name == "zero_outside" else {}
    expected, values = tokenrl.topk_distillation_loss(
        objective, stats.logp, lists["other_logp_topk"], topk_mask=topk_mask, **rest
    )
    budget = None if rows is None else rows * (V * 8 + D * 8 + 128)
    poisoned = case | {"hidden": torch.where(more["mask"][..., None], case["hidden"], torch.nan)}
    found, per_token = tokenrl.linear_topk_distillation_loss(
        objective, **poisoned, **lists, **options, **more, topk_mask=topk_mask, memory_budget=budget, backend=backend
    )
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-9, atol=1e-12)
    pays = more["mask"] & (more["token_weight"] != 0)
    torch.testing.assert_close(per_token, torch.where(pays, values, 0).to(found.dtype), rtol=1e-9, atol=1e-12)
    grads = [torch.autograd.grad(2 * loss, at, retain_graph=True) for loss in (found, expected)]
    for got, wanted in zip(*grads, strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("backend", kernel_backends())
def test_one_pass_over_the_tokens_that_pay(backend, monkeypatch):
    case, lists, more = batch(device_of(backend))
    case["hidden"].requires_grad_()
    rows, run = [], one_pass.run

    def counting(ops, inputs, terms, grads):
        assert grads.weight is None and grads.bias is None and grads.hidden is not None
        return run(ops, inputs, lambda at, *stats: rows.append(len(stats[0])) or terms(at, *stats), grads)

    monkeypatch.setattr(one_pass, "run", counting)
    loss, values = tokenrl.linear_topk_distillation_loss("kd", **case, **lists, **more, backend=backend)
    (grad,) = torch.autograd.grad(loss, case["hidden"])
    pays = more["mask"] & (more["token_weight"] != 0)
    assert sum(rows) == pays.sum() and torch.equal(grad.any(-1), pays) and not values.requires_grad
    rows.clear()
    with torch.no_grad():
        monkeypatch.setattr(one_pass, "run", run)
        again, _ = tokenrl.linear_topk_distillation_loss("kd", **case, **lists, **more, backend=backend)
    assert torch.equal(again, loss) and not again.requires_grad


@pytest.mark.parametrize("backend", kernel_backends())
def test_narrow_dtypes(backend, dtype=torch.bfloat16):
    """The gradients have the dtype of their tensors, and are near those of fp64."""
    case, lists, more = batch(device_of(backend), dtype)
    wide = {name: x.double().requires_grad_() for name, x in case.items()}
    at = leaves(case)
    found, _ = tokenrl.linear_topk_distillation_loss("kd", **case, **lists, **more, backend=backend)
    expected, _ = tokenrl.linear_topk_distillation_loss("kd", **wide, **lists, **more, backend=backend)
    far = 4e-2
    torch.testing.assert_close(found.double(), expected, rtol=far, atol=0)
    pairs = (torch.autograd.grad(found, at), torch.autograd.grad(expected, list(wide.values())))
    for got, wanted in zip(*pairs, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=far * wanted.abs().max().item())


def test_packed_and_traced():
    case, lists, more = batch()
    at = leaves(case)
    expected, _ = tokenrl.linear_topk_distillation_loss("kd", **case, **lists, **more)
    flat = {name: x.flatten(0, 1) for name, x in (lists | more | {"hidden": case["hidden"]}).items()}
    found, _ = tokenrl.linear_topk_distillation_loss(
        "kd", **case | flat, cu_seqlens=torch.arange(0, B * T + 1, T)
    )  # fmt: skip
    traced = torch.compile(
        lambda *x: tokenrl.linear_topk_distillation_loss("kd", *x[:2], *lists.values(), bias=x[2], **more)[0],
        backend="eager", fullgraph=True,
    )  # fmt: skip
    truth = torch.autograd.grad(expected, at)
    for loss in (found, traced(*at)):
        torch.testing.assert_close(loss, expected)
        for got, wanted in zip(torch.autograd.grad(loss, at), truth, strict=True):
            assert wanted.any()
            torch.testing.assert_close(got, wanted)


CASE, LISTS, MORE = batch()
ERRORS = {
    "objective": ({"objective": "dk"}, "objective: got 'dk', accepted: kd"),
    "list": ({"other_logp_topk": LISTS["ids"]}, r"other_logp_topk: got torch.int64 \[2, 9, 4\], accepted: float32 or"),
    "shape": (
        {"other_logp_topk": CASE["hidden"]},
        r"other_logp_topk: got torch.float64 \[2, 9, 5\], accepted: float32",
    ),
    "gradient": (
        {"other_logp_topk": LISTS["other_logp_topk"].clone().requires_grad_()},
        "other_logp_topk: got a tensor that",
    ),
    "topk_mask": ({"topk_mask": MORE["mask"]}, r"topk_mask: got torch.bool \[2, 9\], accepted: bool \[2, 9, 4\]"),
    "entropy": ({"entropy": CASE["hidden"]}, "entropy: got a tensor, accepted: none: it is made here"),
    "rest": ({"rest": "tails"}, "rest: got 'tails', accepted: tail"),
    "budget": ({"memory_budget": 100}, "memory_budget: got 100 bytes, accepted: more"),
    "ids": ({"ids": LISTS["ids"] + V}, "ids: got values from"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenrl.linear_topk_distillation_loss(**{"objective": "kd"} | CASE | LISTS | MORE | changes)


def test_it_is_differentiated_once():
    case, lists, _ = batch()
    hidden = case["hidden"].requires_grad_()
    loss, _ = tokenrl.linear_topk_distillation_loss("kd", **case, **lists, backend="cpu")
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_topk_distillation_loss: differentiated twice, accepted: once"):
        torch.autograd.grad(grad.sum(), hidden)
