"""linear_policy_loss with a frozen head: hidden's gradient in one pass, wherever chunks end."""

import functools

import pytest
import torch
from cases import kernel_backends
from linear_cases import same_bits
from linear_policy_cases import (
    TORCHS,
    budget_of,
    called,
    check,
    gemms,
    leaves,
    make,
    placed,
    run,
    settled,
    valid,
    without,
)

import tokenrl
from bench.measure import peak_memory
from tokenrl.ops.linear import directions, policy_loss

KERNELS = kernel_backends()
FAST = pytest.mark.parametrize("backend", [name for name in KERNELS if name not in ("triton", "sim")])
CPU = pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ backend is not built")
FROZEN = ("weight", "bias")
LONG = functools.partial(make, width=24, dim=4)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    for cut in (policy_loss, directions):
        monkeypatch.setattr(cut, "FEWEST_TOKENS", 2)


def too_small(case: dict, dtype: torch.dtype = torch.float32) -> int:
    """The memory_budget of a chunk that the longest sequence does not fit into."""
    return budget_of(case, valid(case).sum(1).max().item() - 1, dtype)


def row(name: str) -> tokenrl.Objective:
    return tokenrl.objective("ctpo", flow="through") if name == "ctpo through" else tokenrl.objective(name)


@FAST
@pytest.mark.parametrize("name", ["gspo", "gspo_token", "ctpo through"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_pass_though_no_sequence_fits(dtype, name, backend):
    """In fp64 to 1e-12. Masked tokens have no gradient."""
    objective = row(name)
    case = settled(objective, functools.partial(LONG, spread=6.0 if dtype.itemsize == 2 else 2.0), dtype)
    more = {"memory_budget": too_small(case, dtype), "frozen": FROZEN}
    assert check(objective, case, backend, dtype, kl_coef=0.3, **more)["passes"] == 1
    alone = check(objective, case, backend, dtype, **more)
    assert alone["passes"] == 1 and not alone["hidden"][~valid(case)].any() and alone["hidden"].any()


@FAST
def test_two_passes_where_one_costs_as_much(backend, monkeypatch):
    """An entropy's gradient is a GEMM more; too few rows fit."""
    case = settled("gspo", LONG)
    more = {"memory_budget": too_small(case), "frozen": FROZEN}
    assert check("gspo", case, backend, torch.float32, entropy_coef=0.1, **more)["passes"] == 2
    monkeypatch.setattr(directions, "FEWEST_TOKENS", 24)
    assert check("gspo", case, backend, torch.float32, **more)["passes"] == 2


@FAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gmpo", "fipo", "fiberpo"])
def test_forms_take_one_pass_too(name, dtype, backend):
    """By way of all log-probs, whose coefficients autograd makes. An entropy term takes two."""
    spread = 6.0 if dtype.itemsize == 2 else 2.0
    case = settled(name, lambda seed: without(LONG(seed, spread=spread), "segment_ids"), dtype)
    more = {"memory_budget": too_small(case, dtype), "frozen": FROZEN}
    assert check(name, case, backend, dtype, **more)["passes"] == 1
    assert check(name, case, backend, dtype, entropy_coef=0.1, **more)["passes"] == 2


@FAST
def test_a_form_hands_back_the_same_gradient_again(backend):
    case = settled("gmpo", LONG)
    given = placed(case | {"memory_budget": too_small(case)}, backend, torch.float32)
    wanted = leaves(given, FROZEN)
    loss, metrics = called("gmpo", given, backend)
    first, second, half = (
        torch.autograd.grad(by * loss, wanted["hidden"], retain_graph=True)[0] for by in (1.0, 1.0, 0.5)
    )
    assert metrics.passes == 1 and torch.equal(first, second) and torch.equal(first / 2, half) and first.any()


@FAST
def test_the_rows_of_a_chunk_change_no_bit_of_a_token(backend):
    case = settled("gspo", functools.partial(LONG, exact=True))
    budgets = budget_of(case, 12), too_small(case)
    some = [run("gspo", case, backend, torch.float32, frozen=FROZEN, memory_budget=budget) for budget in budgets]
    assert some[0]["passes"] == some[1]["passes"] == 1
    same_bits(*some, torchs=TORCHS)


@FAST
def test_a_token_of_weight_zero_may_hold_anything(backend):
    """As where tokens without a coefficient enter no GEMM."""
    case = settled("gspo", LONG)
    case["token_weight"] = torch.ones(case["ids"].shape, dtype=torch.float64)
    case["token_weight"][0, 0] = 0
    given = placed(case | {"memory_budget": too_small(case)}, backend, torch.float32)
    given["hidden"][0, 0] = torch.inf
    assert valid(case)[0, 0]
    wanted = leaves(given, FROZEN)
    loss, metrics = called(row("gspo_token"), given, backend)
    (grad,) = torch.autograd.grad(loss, wanted.values())
    assert metrics.passes == 1 and not grad[0, 0].any()


@CPU
def test_two_gemms_of_each_token():
    """4 N D V flops; 6 of two passes, where the entropy's gradient wants a GEMM of its own."""
    case = LONG()
    count, each = valid(case).sum().item(), 2 * 4 * 50

    def flops(name, **more):
        given = placed(case | {"memory_budget": budget_of(case, 12)} | more, "cpu", torch.float32)
        leaves(given, FROZEN)
        _, found = gemms(lambda: called(name, given, "cpu")[0].backward())
        return sum(2 * rows * inner * columns for (rows, inner), (_, columns) in found)

    assert flops("gspo", kl_coef=0.3) == flops("gmpo", kl_coef=0.3) == 2 * count * each
    assert flops("gspo", entropy_coef=0.1) == flops("gmpo", entropy_coef=0.1) == 3 * count * each


@CPU
def test_a_direction_of_each_token_is_held_beside_the_budget():
    """None where hidden's gradient is of their dtype: they become it."""
    hidden, weight = torch.randn(512, 64), torch.randn(5000, 64)
    ids, budget = torch.zeros(512, dtype=torch.int64), 2 << 20
    rest = (torch.full((512,), -9.0), torch.ones(1))
    for dtype, beside in ((torch.float32, 0), (torch.bfloat16, 4 * 512 * 64)):
        states, head = hidden.to(dtype).requires_grad_(), weight.to(dtype)

        def forward(given=(states, head, ids, *rest)):
            more = {"cu_seqlens": torch.tensor([0, 512]), "memory_budget": budget, "backend": "cpu"}
            loss, metrics = tokenrl.linear_policy_loss("gspo", *given, **more)
            assert metrics.passes == 1
            return loss

        small = 64 * 512  # log-probs, entropies and what the objective makes of them
        assert peak_memory(forward, "cpu") <= budget + states.nbytes + beside + small
