"""Two heads' logits side by side: an fp16 head under a loss scale, one head of both, and what it holds."""

import pytest
import torch
from cases import device_of, kernel_backends
from linear_cases import pair_budget
from torch.utils.checkpoint import checkpoint

import tokenrl
from tokenrl.ops.linear import gemm
from tokenrl.ops.linear.head import Head

FAST = pytest.mark.parametrize("backend", [name for name in kernel_backends() if name in ("cpu", "cuda")])
N, D, V, ROWS = 100, 8, 61, 70  # rows of a chunk: two
HALF, SCALE = torch.float16, 2.0**20  # of a loss over as many tokens, whose gradients of logits are below 6e-8
TRAINED = ("hidden", "weight", "bias")


def batch(backend, dtype):
    g = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, D), "weight": (V, D), "bias": (V,), "other_hidden": (N, D), "other_weight": (V, D)}
    case = {name: torch.randn(*shape, generator=g).to(dtype).to(device_of(backend)) for name, shape in shapes.items()}
    case["weight"] *= 2
    return case


def gradients(loss_of, case):
    """Under a loss scale."""
    at = [case[name].detach().requires_grad_() for name in TRAINED]
    loss = loss_of(**case | dict(zip(TRAINED, at, strict=True)))
    return torch.autograd.grad(SCALE * loss, at)


def of_distillation(kind, **how):
    return lambda **case: tokenrl.linear_distillation_loss(
        kind, **case, cu_seqlens=torch.tensor([0, N], device=case["hidden"].device), normalizer=SCALE,
        aggregation="seq-mean-token-sum-norm", **how,
    )[0]  # fmt: skip


def of_divergence(kind, **how):
    return lambda **case: tokenrl.linear_token_divergence(**case, kind=kind, **how).sum() / SCALE


def of_topk(kind, **how):
    def loss(other_hidden, other_weight, **case):
        logp, ids = (other_hidden.double() @ other_weight.double().t()).log_softmax(-1).topk(5)
        return tokenrl.linear_topk_distillation_loss(
            kind, **case, ids=ids, other_logp_topk=logp, rest="tail", normalizer=SCALE,
            aggregation="seq-mean-token-sum-norm", cu_seqlens=torch.tensor([0, N], device=ids.device), **how,
        )[0]  # fmt: skip

    return loss


def of_preference(kind, passes=1, **how):
    """A row with a divergence from the reference; of pairs of sequences of 10."""

    def loss(other_hidden, other_weight, **case):
        ids = torch.arange(N, device=other_hidden.device) % V
        pairs = torch.arange(10, device=ids.device).view(5, 2)
        found, metrics = tokenrl.linear_preference_loss(
            kind, **case, ids=ids, ref_hidden=other_hidden, ref_weight=other_weight, pairs=pairs, normalizer=SCALE,
            cu_seqlens=torch.arange(0, N + 1, 10, device=ids.device), **how,
        )  # fmt: skip
        assert metrics.passes == passes
        return found

    return loss


LOSSES = {
    "kd": (of_distillation, "kd"), "reverse_kd": (of_distillation, "reverse_kd"), "topk": (of_topk, "kd"),
    "divergence": (of_divergence, "reverse_kl"), "tdpo2": (of_preference, "tdpo2"),
}  # fmt: skip


@FAST
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_that_fp16_holds_under_a_loss_scale_alone(name, backend):
    make, kind = LOSSES[name]
    case, budget = batch(backend, HALF), pair_budget(ROWS, D, V, 2)
    found = gradients(make(kind, backend=backend, memory_budget=budget), case)
    truth = gradients(make(kind, backend=backend), {name: x.double() for name, x in case.items()})
    for got, wanted in zip(found, truth, strict=True):
        assert got.dtype == HALF and wanted.any()
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-2 * wanted.abs().max().item())


@FAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_head_of_both_is_multiplied_once(dtype, backend, monkeypatch):
    """The numbers are those of a copy of the head, the GEMMs half as many."""
    case, sizes = batch(backend, dtype), []
    del case["other_weight"]
    real = Head.whole_logits
    monkeypatch.setattr(Head, "whole_logits", lambda head, x, out: sizes.append(len(x)) or real(head, x, out))
    results = []
    for other in (case["weight"], case["weight"].clone()):
        hidden = case["hidden"].detach().requires_grad_()
        loss, values = tokenrl.linear_distillation_loss(
            "gkd", hidden, case["weight"], case["other_hidden"], other, bias=case["bias"], other_bias=case["bias"],
            cu_seqlens=torch.tensor([0, N], device=hidden.device), backend=backend,
        )  # fmt: skip
        results.append((loss, values, *torch.autograd.grad(loss, hidden)))
    assert sizes == [2 * N, N, N]
    assert all(x.any() for x in results[0])
    torch.testing.assert_close(*results, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


@FAST
def test_a_divergence_whose_pairs_fit_into_no_chunk_makes_both_logits_twice(backend, monkeypatch):
    case, rows = batch(backend, torch.float64), []
    real = Head.whole_logits
    monkeypatch.setattr(Head, "whole_logits", lambda head, x, out: rows.append(len(x)) or real(head, x, out))
    ids = torch.arange(N, device=case["hidden"].device) % V
    reference = {"ref_hidden": case.pop("other_hidden"), "ref_weight": case.pop("other_weight")}
    at = [case[name].requires_grad_() for name in TRAINED]
    cu_seqlens = torch.tensor([0, N // 2, N], device=ids.device)

    def called(rows=None):
        budget = None if rows is None else pair_budget(rows, D, V, 8)
        return tokenrl.linear_preference_loss(
            "tdpo2", **case, **reference, ids=ids, cu_seqlens=cu_seqlens, memory_budget=budget, backend=backend
        )

    whole, few = called(), called(30)
    assert (whole[1].passes, few[1].passes) == (1, 2) and rows == [N, N, *[25] * 16]
    torch.testing.assert_close(few[0], whole[0])
    for got, wanted in zip(*(torch.autograd.grad(loss, at) for loss, _ in (few, whole)), strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted)
    rows.clear()
    with torch.no_grad():
        again, metrics = called(30)
    assert metrics.passes == 1 and rows == [25] * 8 and again == few[0].detach()


@FAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, HALF], ids=str)
@pytest.mark.parametrize("row,fits", [("dpo", 30), ("dpo", 70), ("dpo", N), ("tdpo2", 30), ("tdpo2", N)])
def test_main_grad_of_a_preference_gets_what_weight_grad_does_not(row, fits, dtype, backend):
    """In one pass over one chunk, over several, and in two passes."""
    case = batch(backend, dtype)
    ids, divergence = torch.arange(N, device=case["hidden"].device) % V, tokenrl.PREFERENCES[row].divergence
    case |= {"ref_hidden": case.pop("other_hidden"), "ref_weight": case.pop("other_weight"), "ids": ids}
    case["cu_seqlens"] = torch.arange(0, N + 1, 25, device=ids.device)
    size = dtype.itemsize
    budget = pair_budget(fits, D, V, size) if divergence else fits * (V * size + D * size + 128)
    how = {"memory_budget": budget, "backend": backend}
    at = [case[name].requires_grad_() for name in TRAINED]
    expected = torch.autograd.grad(tokenrl.linear_preference_loss(row, **case, **how)[0], at)
    main_grad = torch.ones(V, D, device=ids.device)
    loss, metrics = tokenrl.linear_preference_loss(row, **case, **how, main_grad=main_grad)
    assert metrics.passes == (2 if fits == 30 else 1)
    for times in (1, 2):
        (0.5 * loss).backward(retain_graph=times == 1)
        far = 2e-2 if dtype != torch.float32 else 1e-5
        torch.testing.assert_close(main_grad - 1, times * 0.5 * expected[1].float(), rtol=far, atol=far)
    hidden, weight, bias = at
    assert weight.grad is None and bias.grad.any()
    torch.testing.assert_close(hidden.grad, expected[0], rtol=far, atol=1e-3)


@FAST
@pytest.mark.parametrize("name", ["tdpo2", "topk"])
def test_torch_func_gives_the_same_gradients(name, backend):
    make, kind = LOSSES[name]
    case = batch(backend, torch.float64)
    budget = {"backend": backend} if name == "topk" else {"backend": backend, "passes": 2}
    of_func = torch.func.grad(lambda hidden: SCALE * make(kind, **budget)(**case | {"hidden": hidden}))(case["hidden"])
    (wanted, *_) = gradients(make(kind, backend=backend), case)
    assert wanted.any()
    torch.testing.assert_close(of_func, wanted)


@FAST
@pytest.mark.parametrize("name", LOSSES)
def test_inside_a_checkpoint(name, backend):
    """Which hands out what a backward has saved a single time."""
    make, kind = LOSSES[name]
    loss, case = make(kind, backend=backend), batch(backend, torch.float64)
    plain = gradients(loss, case)
    kept = gradients(lambda **case: checkpoint(loss, use_reentrant=False, **case), case)
    assert all(x.any() for x in plain)
    torch.testing.assert_close(kept, plain)


@FAST
def test_a_gradient_stays_where_it_was_made_unless_the_graph_is_kept(backend, monkeypatch):
    case, places = batch(backend, torch.float32), []
    real = gemm.scaled

    def watched(x, *how):
        found = real(x, *how)
        places.append(found.data_ptr() == x.data_ptr())
        return found

    monkeypatch.setattr("tokenrl.ops.linear_divergence_ops.scaled", watched)
    hidden = case["hidden"].requires_grad_()
    loss, _ = tokenrl.linear_distillation_loss(
        "kd", **case, cu_seqlens=torch.tensor([0, N], device=hidden.device), backend=backend
    )
    (first,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (last,) = torch.autograd.grad(3 * loss, hidden)
    assert places == [False, True] and kept.any() and torch.equal(last, kept)
