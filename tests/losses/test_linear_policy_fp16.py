"""linear_policy_loss of an fp16 head under a loss scale, as GradScaler's: gradients that fp16 holds only once they are
multiplied by it, and sums that it holds only once they are divided."""

import functools

import pytest
import torch
from cases import device_of, kernel_backends
from linear_policy_cases import HEAD, budget_of, called, check, leaves, make, placed, run, settled, without

from tokenrl.instruments.parity import close
from tokenrl.ops.linear import policy_loss

KERNELS = kernel_backends()
EVERY_KERNEL = pytest.mark.parametrize("backend", KERNELS)
FAST = pytest.mark.parametrize("backend", [name for name in KERNELS if name not in ("triton", "sim")])
HALF, COUNT, SCALE = torch.float16, 2.0**20, 65536.0  # a step of a million tokens: coef = 1e-6, and p = 0.02
BOTH = {"kl_coef": 0.3, "entropy_coef": 0.1}
ENOUGH = 12  # tokens of a chunk


def scaled_back(objective, case, backend, count=COUNT, scale=SCALE, **more):
    return check(objective, case, backend, HALF, normalizer=count, scale=scale, **more)


@EVERY_KERNEL
@pytest.mark.parametrize("terms", [{}, BOTH], ids=["alone", "kl and entropy"])
def test_what_is_too_small_for_fp16_waits_for_the_loss_scale(terms, backend):
    case = settled("cispo", functools.partial(make, rows=4, width=6, spread=5.0), HALF)
    found = scaled_back("cispo", case, backend, **terms)
    assert all(found[name].dtype == HALF for name in HEAD)
    assert (found["weight"] != 0).any(1).all(), "every token has a probability"


@FAST
@pytest.mark.parametrize("objective", ["grpo", "gspo", "gmpo"])
@pytest.mark.parametrize("how", ["one chunk", "chunks", "two passes"])
@pytest.mark.parametrize("compute", [None, torch.float32])
def test_in_chunks_and_two_passes(compute, how, objective, backend, monkeypatch):
    case = settled(objective, functools.partial(make, rows=8, dim=4), HALF)
    if how != "one chunk":
        monkeypatch.setattr(policy_loss, "FEWEST_TOKENS", 2 if how == "chunks" else 2 * ENOUGH)
    budget = None if how == "one chunk" else budget_of(case, 2 * ENOUGH if compute else ENOUGH, compute or HALF)
    found = scaled_back(objective, case, backend, compute_dtype=compute, memory_budget=budget)
    assert found["passes"] == (2 if how == "two passes" or (objective == "gmpo" and budget) else 1)


VARIANTS = {
    "temperatures": {"temperature": torch.linspace(0.1, 8.0, 54).view(6, 9)},
    "softcap": {"softcap": 5.0, "logit_scale": 3.0},
}


@FAST
@pytest.mark.parametrize("variant", VARIANTS)
def test_under_a_transform(variant, backend):
    scaled_back("grpo", settled("grpo", lambda seed: make(seed, **VARIANTS[variant]), HALF), backend, **BOTH)


@FAST
@pytest.mark.parametrize("terms", [{}, BOTH], ids=["alone", "kl and entropy"])
def test_what_is_too_large_for_fp16_too(terms, backend):
    """Coefficients beyond 65504, whose sums are larger still, from a loss that is divided afterwards."""
    case = settled("grpo", make, HALF)
    found = scaled_back("grpo", case, backend, count=2.0**-20, scale=2.0**-20, **terms)
    assert all(found[name].isfinite().all() for name in HEAD)


@FAST
def test_a_batch_of_one_id_has_finite_sums(backend):
    """Each row of the weight's gradient is then as large as the lift allows for."""
    case = without(make(rows=16, width=32, dim=4, poison=False), "token_weight", "segment_ids")
    case["hidden"], case["advantages"] = case["hidden"].abs() + 8, case["advantages"].abs() + 1
    case["ids"], case["old_logp"] = torch.zeros_like(case["ids"]), None
    scaled_back("grpo", case, backend)


@FAST
@pytest.mark.parametrize("passes", [1, 2])
def test_main_grad_is_as_exact_as_fp32(passes, backend, monkeypatch):
    """It never meets fp16: neither its entries nor what is added to it need a loss scale."""
    case = settled("grpo", functools.partial(make, dim=4), HALF)
    truth = run("grpo", case, "reference", torch.float64, normalizer=1.0)["weight"]
    base = run("grpo", case, "reference", HALF, normalizer=COUNT, scale=COUNT)["weight"]
    if passes == 2:
        monkeypatch.setattr(policy_loss, "FEWEST_TOKENS", 2 * ENOUGH)
    budget = None if passes == 1 else budget_of(case, ENOUGH, HALF)
    main_grad = torch.zeros(50, 4, device=device_of(backend))
    given = placed(case | {"memory_budget": budget, "normalizer": COUNT}, backend, HALF) | {"main_grad": main_grad}
    wanted = leaves(given)
    loss, metrics = called("grpo", given, backend)
    loss.backward()
    assert wanted["weight"].grad is None and metrics.passes == passes
    close(main_grad.cpu() * COUNT, truth, base.float())


@FAST
def test_one_traced_graph_gives_the_same_gradients(backend):
    """The op's gradients are fp32, those of its derivative fp16, in a trace too."""
    given = placed(make() | {"normalizer": COUNT} | BOTH, backend, HALF)
    wanted = leaves(given)

    def loss(hidden, weight):
        return called("ctpo", given | {"hidden": hidden, "weight": weight}, backend)[0] * SCALE

    traced = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, found = (torch.autograd.grad(f(given["hidden"], given["weight"]), wanted.values()) for f in (loss, traced))
    assert all(x.dtype == HALF for x in found)
    torch.testing.assert_close(found, eager)


@FAST
def test_a_coefficient_that_is_not_finite_is_no_lift(backend):
    """Inf or NaN in the gradients, where a GradScaler looks for it."""
    case = make(poison=False) | {"normalizer": 1e-38}
    case["advantages"] = case["advantages"] * 1e4
    found = run("grpo", case, backend, HALF)
    assert not found["weight"].isfinite().all() and not found["hidden"].isfinite().all()
