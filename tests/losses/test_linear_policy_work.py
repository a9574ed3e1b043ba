"""What linear_policy_loss costs and hands back: GEMMs, upstream gradients, main_grad, traced and empty batches."""

import pytest
import torch
from cases import device_of, kernel_backends
from linear_cases import same_bits
from linear_policy_cases import (
    HEAD,
    TORCHS,
    budget_of,
    called,
    check,
    gemms,
    leaves,
    make,
    packed,
    placed,
    run,
    same,
    settled,
)
from linear_policy_cases import valid as active

import tokenrl
from bench.measure import peak_memory
from tokenrl.instruments.parity import close
from tokenrl.ops.linear import policy_loss

KERNELS = kernel_backends()
COMPILED = pytest.mark.parametrize("backend", [name for name in KERNELS if name not in ("triton", "sim")])
CPU = pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ backend is not built")
BOTH = {"kl_coef": 0.3, "entropy_coef": 0.1}


def step(objective, case, backend, dtype=torch.float32, frozen=(), **more):
    """(loss, the leaves by name)."""
    given = placed(case | more, backend, dtype)
    wanted = leaves(given, frozen)
    return called(objective, given, backend)[0], wanted


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.125, 3.0])
def test_the_upstream_gradient_scales_the_gradients(scale, dtype, backend):
    """Exactly by a power of two, to a rounding by any other number; no GEMM of the forward is repeated."""
    loss, wanted = step("ctpo", make(), backend, dtype, **BOTH)
    plain, scaled = (torch.autograd.grad(loss * by, wanted.values(), retain_graph=True) for by in (1.0, scale))
    exact = [(x.double() * scale).to(dtype) for x in plain]
    assert all(torch.equal(x, y) for x, y in zip(scaled, exact, strict=True))


@COMPILED
def test_micro_batches_with_the_global_normalizer_accumulate(backend):
    case = settled("grpo")
    case["normalizer"] = torch.tensor(5.0)
    truth, base = (run("grpo", case, "reference", dtype, **BOTH) for dtype in (torch.float64, torch.float32))
    given = placed(case, backend, torch.float32)
    wanted = leaves(given)
    total = 0
    for rows in (slice(0, 2), slice(2, 6)):
        part = {k: x[rows] if isinstance(x, torch.Tensor) and x.shape[:1] == (6,) else x for k, x in given.items()}
        loss, _ = called("grpo", part | BOTH, backend)
        loss.backward()
        total += loss.detach()
    found = {name: x.grad.cpu() for name, x in wanted.items()} | {"loss": total.cpu()}
    same(found, {name: truth[name] for name in found}, base, backend)


@COMPILED
@pytest.mark.parametrize("objective", ["grpo", "gspo"])
@pytest.mark.parametrize("rows", [3, 50])
def test_under_no_grad_there_is_the_forward_alone(rows, objective, backend, monkeypatch):
    """One pass whatever fits: nothing is computed again, and nothing is kept."""
    case = settled(objective, lambda seed: make(seed, dim=4, width=24))
    budget = budget_of(case, 12 if rows == 3 else 200)
    given = placed(case | {"memory_budget": budget} | BOTH, backend, torch.float32)
    leaves(given)
    with torch.no_grad():
        (loss, metrics), found = gemms(lambda: called(objective, given, backend))
    assert loss.grad_fn is None and metrics.passes == 1
    assert sum(shapes[0][0] for shapes in found) == active(case).sum()
    truth, base = (run(objective, case, "reference", dtype, **BOTH) for dtype in (torch.float64, torch.float32))
    same({"loss": loss.cpu()}, {"loss": truth["loss"]}, base, backend)


@CPU
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight")], ids="+".join)
def test_a_frozen_tensor_costs_no_gemm(frozen):
    """And gets no gradient; the others get the same."""
    case = make()
    count = active(case).sum().item()
    logits, of_hidden, of_weight = ((count, 8), (8, 50)), ((count, 50), (50, 8)), ((50, count), (count, 8))
    (loss, wanted), found = gemms(lambda: step("cispo", case, "cpu", frozen=frozen))
    costs = [("hidden", of_hidden), ("weight", of_weight)]
    assert found == [logits, *(shapes for name, shapes in costs if name not in frozen)]
    _, found = gemms(loss.backward)
    assert found == [] and set(wanted) == {*HEAD} - {*frozen}
    every = run("cispo", case, "cpu", torch.float32)
    same_bits({name: x.grad for name, x in wanted.items()}, every)


@CPU
def test_a_head_that_is_frozen_whole_has_no_graph():
    loss, _ = step("grpo", make(), "cpu", frozen=HEAD)
    assert loss.grad_fn is None and not loss.requires_grad


@CPU
def test_a_frozen_weight_takes_no_memory():
    """Its gradient would be [V, D], here 5 MB."""
    hidden, weight = torch.zeros(1, 8, 64, requires_grad=True), torch.zeros(20000, 64)
    ids, budget = torch.zeros(1, 8, dtype=torch.int64), 1 << 20

    def forward():
        return tokenrl.linear_policy_loss(
            "grpo", hidden, weight, ids, None, torch.ones(1), memory_budget=budget, backend="cpu"
        )

    assert peak_memory(forward, "cpu") <= budget + hidden.nbytes + 4096


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [9, 200])
def test_main_grad_gets_what_weight_grad_does_not(rows, dtype, backend, monkeypatch):
    """The gradient times the upstream one is added, by each backward, in fp32 whatever the weight is in."""
    monkeypatch.setattr(policy_loss, "FEWEST_TOKENS", 2)
    case = settled("ctpo", lambda seed: make(seed, rows=4, width=6, spread=5.0), dtype)
    truth, base = (run("ctpo", case, "reference", of)["weight"] for of in (torch.float64, dtype))
    wide = torch.promote_types(dtype, torch.float32)
    prior = torch.randn(50, 8, generator=torch.Generator().manual_seed(4), dtype=wide)
    main_grad = prior.to(device_of(backend), copy=True)
    given = placed(case | {"memory_budget": budget_of(case, rows, dtype)}, backend, dtype) | {"main_grad": main_grad}
    wanted = leaves(given)
    loss, _ = called("ctpo", given, backend)
    assert torch.equal(main_grad.cpu(), prior)
    for times in (1, 2):
        (loss * 0.5).backward(retain_graph=True)
        exact = times * 0.5 * truth
        close(main_grad.cpu(), prior.double() + exact, prior + times * 0.5 * base.to(wide), what=f"{times} times")
    assert wanted["weight"].grad is None and wanted["hidden"].grad is not None


@CPU
def test_main_grad_of_a_frozen_weight_stays():
    main_grad = torch.ones(50, 8)
    given = placed(make(), "cpu", torch.float32) | {"main_grad": main_grad}
    leaves(given, frozen=("weight",))
    called("grpo", given, "cpu")[0].backward()
    assert (main_grad == 1).all()


@COMPILED
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_retained_graph_gives_the_same_gradients_again(scale, backend):
    loss, wanted = step("ctpo", make(), backend, **BOTH)
    first, second = (torch.autograd.grad(loss * scale, wanted.values(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@CPU
def test_what_is_done_to_a_gradient_does_not_reach_a_retained_graph():
    """Three times what one backward gives, though .grad is added to in place."""
    loss, wanted = step("ctpo", make(), "cpu")
    once = torch.autograd.grad(loss, wanted.values(), retain_graph=True)
    once = [x.clone() for x in once]
    for _ in range(3):
        loss.backward(retain_graph=True)
    for x, grad in zip(wanted.values(), once, strict=True):
        torch.testing.assert_close(x.grad, 3 * grad)


@COMPILED
def test_double_backward_raises(backend):
    loss, wanted = step("grpo", make(), backend)
    (grad,) = torch.autograd.grad(loss.square(), wanted["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


@COMPILED
@pytest.mark.parametrize("objective", ["ctpo", "gspo"])
@pytest.mark.parametrize("shape", ["padded", "packed"])
def test_one_traced_graph_gives_the_same_numbers(shape, objective, backend):
    case = packed(make()) if shape == "packed" else make()

    def loss(hidden, weight, given):
        return called(objective, given | {"hidden": hidden, "weight": weight} | BOTH, backend)

    given = placed(case, backend, torch.float32)
    wanted = leaves(given)
    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, traced):
        value, metrics = function(given["hidden"], given["weight"], given)
        results.append([value, metrics.raw, *torch.autograd.grad(value, wanted.values())])
    torch.testing.assert_close(*results)


@COMPILED
@pytest.mark.parametrize("rows", [5, 200])
def test_the_same_call_gives_the_same_bits(rows, backend, monkeypatch):
    monkeypatch.setattr(policy_loss, "FEWEST_TOKENS", 2)
    case = make(rows=9, width=20, exact=True)
    more = {"memory_budget": budget_of(case, rows)} | BOTH
    same_bits(*(run("ctpo", case, backend, torch.float32, **more) for _ in range(2)), torchs=TORCHS)


# The interpreter divides before it selects.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("objective", ["ctpo", "gspo"])
def test_a_batch_without_a_valid_token_has_loss_zero(objective, backend):
    """All masked, or all ignored: no gradient, and no NaN though the tensors hold nothing else."""
    case = make()
    nothing = case | {"hidden": case["hidden"] * torch.nan}
    for empty in (nothing | {"mask": case["mask"] & False}, nothing | {"ids": torch.full_like(case["ids"], -100)}):
        found = run(objective, empty, backend, torch.float32, **BOTH)
        zeros = ("loss", "kl", "entropy", "tokens", "left_out", *HEAD)
        assert all(found[name].count_nonzero() == 0 for name in zeros) and found["passes"] == 1


@COMPILED
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,)])
def test_a_batch_without_tokens_has_loss_zero_and_a_graph(shape, backend):
    case = {
        "hidden": torch.zeros(*shape, 4), "weight": torch.ones(5, 4), "ids": torch.zeros(shape, dtype=torch.int64),
        "old_logp": torch.zeros(shape), "advantages": torch.ones(shape[0]),
    }  # fmt: skip
    more = {"cu_seqlens": torch.zeros(1, dtype=torch.int64)} if len(shape) == 1 else {}
    found = run("ctpo", case | more, backend, torch.float32)
    assert found["loss"] == 0 and found["hidden"].shape == (*shape, 4) and found["weight"].count_nonzero() == 0


@CPU
def test_autocast_changes_nothing():
    plain = run("ctpo", make(), "cpu", torch.float32, **BOTH)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run("ctpo", make(), "cpu", torch.float32, **BOTH)
    same_bits(plain, cast, torchs=plain)


@CPU
def test_twice_the_error_of_the_reference_at_most_at_the_shape_of_a_small_head():
    case = make(rows=8, width=40, dim=64, vocab=4000)
    check("cispo", case, "cpu", torch.bfloat16, memory_budget=budget_of(case, 70, torch.bfloat16), **BOTH)
