"""Chunks of linear_policy_loss: where they end, what enters them, and that no way to cut changes a number."""

import functools

import pytest
import torch
from cases import device_of, gates_under_test, kernel_backends
from linear_cases import same_bits
from linear_policy_cases import TORCHS, budget_of, check, check_parts, make, packed, run, settled, valid, without

import tokenrl
from tokenrl.objectives.gates import GATES
from tokenrl.ops.linear import directions, policy_loss
from tokenrl.ops.linear.chunk import Chunk

KERNELS = kernel_backends()
# Chunks are written once over the kernels: a few calls show that the interpreted and simulated ones can be cut.
SLOW = [name for name in KERNELS if name in ("triton", "sim")]
FAST = pytest.mark.parametrize("backend", [name for name in KERNELS if name not in SLOW])
CPU = pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ backend is not built")
LOCAL = ("grpo", "cispo", "ctpo", "ctpo_geomean", "minpro", "kl_k3")
SPANS = ("gspo", "gspo_token", "ctpo through")
ENOUGH = 12  # tokens; with D = 4 the tiles of two passes fit into the budget of their chunk
FROZEN = ("weight", "bias")
BOTH = {"kl_coef": 0.3, "entropy_coef": 0.1}


def named(objective):
    return tokenrl.objective("ctpo", flow="through") if objective == "ctpo through" else tokenrl.objective(objective)


@pytest.fixture
def cut(monkeypatch):
    """How every later call was cut: slices of its active tokens, or None for two passes."""
    found, choose = [], policy_loss._chunks
    for module in (policy_loss, directions):
        monkeypatch.setattr(module, "FEWEST_TOKENS", 2)
    monkeypatch.setattr(policy_loss, "_chunks", lambda *inputs: [found.append(choose(*inputs)), found[-1]][1])
    return found


@pytest.fixture
def computed(monkeypatch):
    """The number of tokens in each chunk of every later call, in the forward and, where some leave, the backward."""
    found, made, keep = {"forward": [], "kept": []}, Chunk.__init__, Chunk._keep

    def init(chunk, *inputs):
        made(chunk, *inputs)
        found["forward"].append(chunk.states.shape[0])

    def kept(chunk, index):
        keep(chunk, index)
        found["kept"].append(chunk.states.shape[0])

    monkeypatch.setattr(Chunk, "__init__", init)
    monkeypatch.setattr(Chunk, "_keep", kept)
    return found


def boundaries(case) -> list[int]:
    """How many active tokens lie before the end of each sequence of a padded batch."""
    return [0, *valid(case).sum(1).cumsum(0).tolist()]


def longest(case) -> int:
    return valid(case).sum(1).max().item()


def stops(parts) -> list[int]:
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    return [part.stop for part in parts]


@FAST
@pytest.mark.parametrize("rows", [2, 7])
@pytest.mark.parametrize("objective", LOCAL)
def test_chunks_end_anywhere_where_no_token_looks_ahead(objective, rows, backend, cut):
    """As few and as even as the budget allows."""
    case = settled(objective)
    count = valid(case).sum().item()
    found = check(objective, case, backend, torch.float32, memory_budget=budget_of(case, rows), **BOTH)
    ends = stops(cut[-1])
    assert found["passes"] == 1 and len(ends) == -(-count // rows) and ends[-1] == count
    assert set(ends) - set(boundaries(case))
    assert max(part.stop - part.start for part in cut[-1]) <= rows


def whole_sequences(ends, fit) -> list[int]:
    """Where chunks end that take as many whole sequences as fit."""
    begin, found = 0, []
    for last, end in zip(ends, ends[1:], strict=False):
        if end - begin > fit:
            found.append(last)
            begin = last
    return [*found, ends[-1]]


@FAST
@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("objective", SPANS)
def test_chunks_end_with_sequences_where_tokens_look_ahead(objective, more, backend, cut):
    case = settled(named(objective))
    ends = boundaries(case)
    fit = longest(case) + more
    found = check(named(objective), case, backend, torch.float32, memory_budget=budget_of(case, fit), **BOTH)
    assert found["passes"] == 1 and stops(cut[-1]) == whole_sequences(ends, fit) and len(cut[-1]) > 1


@CPU
def test_chunks_take_as_many_whole_sequences_as_fit(cut):
    """For every budget between one sequence and all."""
    case = make(rows=8)
    ends = boundaries(case)
    for fit in range(longest(case), ends[-1] + 1):
        run("gspo", case, "cpu", torch.float32, memory_budget=budget_of(case, fit))
        assert stops(cut[-1]) == whole_sequences(ends, fit)


@FAST
@pytest.mark.parametrize("objective", SPANS)
def test_a_sequence_that_does_not_fit_takes_two_passes(objective, backend, cut):
    case = settled(named(objective), functools.partial(make, width=24, dim=4))
    fit = longest(case) - 1
    assert fit >= ENOUGH
    found = check(named(objective), case, backend, torch.float32, memory_budget=budget_of(case, fit), **BOTH)
    assert found["passes"] == 2 and cut[-1] is None


@FAST
@pytest.mark.parametrize("objective", ("grpo", "ctpo", "gspo"))
@pytest.mark.parametrize("rows,passes", [(policy_loss.FEWEST_TOKENS - 1, 2), (policy_loss.FEWEST_TOKENS, 1)])
def test_chunks_of_few_tokens_take_two_passes(rows, passes, objective, backend):
    case = settled(objective, functools.partial(make, rows=16, width=12))
    assert valid(case).sum() > policy_loss.FEWEST_TOKENS
    found = check(objective, case, backend, torch.float32, memory_budget=budget_of(case, rows), **BOTH)
    assert found["passes"] == passes


@CPU
@pytest.mark.parametrize("objective", ("grpo", "ctpo", "gspo"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("passes", [1, 2])
def test_chunks_of_another_dtype(passes, dtype, objective, cut, monkeypatch):
    """16-bit weight gradients of several chunks are summed in fp32."""
    case = settled(objective, functools.partial(make, rows=8, spread=6.0, dim=4), dtype)
    assert longest(case) < ENOUGH < 1.5 * ENOUGH < valid(case).sum()
    if passes == 2:
        monkeypatch.setattr(policy_loss, "FEWEST_TOKENS", 2 * ENOUGH)
    found = check(objective, case, "cpu", dtype, memory_budget=budget_of(case, ENOUGH, dtype), **BOTH)
    assert found["passes"] == passes and (cut[-1] is None if passes == 2 else len(cut[-1]) > 1)


@CPU
def test_one_chunk_may_take_the_memory_of_the_sums(cut):
    """Of the fp32 sums of a 16-bit weight gradient, [V, D], which are several chunks' alone."""
    case = without(make(rows=8), "token_weight")
    count, sums = valid(case).sum().item(), 4 * case["weight"].numel()
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, less, frozen, parts in (
        (bf16, sums, (), 1), (bf16, sums + 1, (), 2), (bf16, 1, ("weight",), 2), (fp32, 1, (), 2), (fp32, 0, (), 1),
    ):  # fmt: skip
        run("grpo", case, "cpu", dtype, frozen=frozen, memory_budget=budget_of(case, count, dtype) - less)
        assert len(cut[-1]) == parts


def kept(seed):
    keep = torch.rand(6, 9, 50, generator=torch.Generator().manual_seed(1)) > 0.3
    return make(seed, keep_mask=keep, temperature=torch.linspace(0.6, 1.8, 54).view(6, 9))


VARIANTS = {
    "packed": lambda seed: packed(make(seed)),
    "no segments": lambda seed: without(make(seed), "segment_ids"),
    "keep_masks and temperatures": kept,
    "clipped tokens, keep_masks and temperatures": lambda seed: kept(seed) | {"entropy_coef": 0.0, "kl_coef": 0.0},
}


@FAST
@pytest.mark.parametrize("objective", ["grpo", "ctpo", "gspo_token"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_of_every_layout_equal_the_parts(variant, objective, backend, cut):
    case = settled(objective, lambda seed: without(VARIANTS[variant](seed), *BOTH))
    terms = {name: VARIANTS[variant](0).get(name, coef) for name, coef in BOTH.items()}
    found = check_parts(objective, case, backend, memory_budget=budget_of(case, 9), **terms)
    assert found["passes"] == 1 and len(cut[-1]) > 1


@FAST
def test_chunks_cut_bounds_per_token(backend, cut):
    bounds = 0.02 + 0.2 * torch.rand(6, 9, generator=torch.Generator().manual_seed(3))
    case = settled(tokenrl.objective("ctpo", eps_low=bounds, eps_high=bounds / 2))
    bounds = bounds.to(device_of(backend))
    objective = tokenrl.objective("ctpo", eps_low=bounds, eps_high=bounds / 2)
    check(objective, case, backend, torch.float32, memory_budget=budget_of(case, 4))
    assert len(cut[-1]) > 1


@pytest.mark.parametrize("backend", SLOW)
@pytest.mark.parametrize("objective,passes,frozen", [("ctpo", 1, ()), ("gspo", 2, ()), ("gspo", 1, FROZEN)])
def test_chunks_of_the_other_kernels(objective, passes, frozen, backend, cut):
    """Two chunks of a local objective, one of whose tokens are clipped; of a sequence that does not fit, two passes, or
    one of a frozen head."""
    case = settled(objective, functools.partial(make, rows=3, width=16, dim=4))
    looks_ahead = objective == "gspo"
    fit = longest(case) - 1 if looks_ahead else -(-valid(case).sum().item() // 2)
    more = {"frozen": frozen} if frozen else {"entropy_coef": 0.1}
    found = check(objective, case, backend, torch.float32, memory_budget=budget_of(case, fit), **more)
    assert found["passes"] == passes and (cut[-1] is None if looks_ahead else len(cut[-1]) == 2)


@FAST
@pytest.mark.parametrize("rows,passes", [(50, 1), (5, 1), (ENOUGH, 2)])
def test_tokens_that_are_left_out_may_hold_anything(rows, passes, backend, cut, computed, monkeypatch):
    """Masked, or ignored by their ids: NaN there changes no bit, and no chunk holds them."""
    clean, dirty = make(dim=4, poison=False, exact=True), make(dim=4, exact=True)
    assert dirty["hidden"].isnan().any() and not clean["hidden"].isnan().any()
    if passes == 2:
        monkeypatch.setattr(policy_loss, "FEWEST_TOKENS", 2 * ENOUGH)
    results = []
    for case in (clean, dirty):
        computed["forward"].clear()
        results.append(run("grpo", case, backend, torch.float32, memory_budget=budget_of(case, rows), **BOTH))
        assert sum(computed["forward"]) == (0 if passes == 2 else valid(case).sum())
    same_bits(*results, torchs=TORCHS)
    assert results[0]["hidden"][~valid(clean)].count_nonzero() == 0


SOME = {"nothing": {}, "the advantages": {"kl_coef": 0.0, "entropy_coef": 0.0}}
ALL = {"kl": {"kl_coef": 0.3}, "entropy": {"entropy_coef": 0.1}}


def no_signal(seed, per_token=False):
    """The advantages of three sequences of six are zero."""
    case = make(seed)
    signs = torch.tensor([1.0, 0.0, 0.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    each = signs[:, None] * torch.linspace(-1, 1, 9, dtype=torch.float64)
    return case | {"advantages": torch.where(case["mask"], each, torch.nan) if per_token else signs}


@FAST
@pytest.mark.parametrize("objective", ["grpo", "ctpo", "gspo", "sapo", "cispo"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("terms", SOME | ALL)
def test_sequences_without_signal_enter_no_gemm(terms, per_token, objective, backend, computed):
    """Unless a term wants them. What is computed equals the parts, which compute everything."""
    more = (SOME | ALL)[terms]
    case = settled(objective, functools.partial(no_signal, per_token=per_token))
    signal = valid(case) & torch.tensor([True, False, False, True, False, True])[:, None]
    count, entering = valid(case).sum(), (valid(case) if terms in ALL else signal).sum()
    # The parts compute the metrics of all tokens.
    names = None if terms in ALL else ("loss", "hidden", "weight", "bias")
    found = check_parts(objective, case, backend, names=names, **more)
    assert computed["forward"] == [entering]
    assert found["left_out"] == count - entering and found["tokens"] == entering


@FAST
def test_a_batch_without_signal_has_loss_zero(backend, computed):
    case = make() | {"advantages": torch.zeros(6)}
    found = run("grpo", case, backend, torch.float32)
    assert computed["forward"] == [] and found["left_out"] == valid(case).sum() and found["tokens"] == 0
    assert all(found[name].count_nonzero() == 0 for name in ("loss", "hidden", "weight", "bias"))


@pytest.mark.parametrize("name", [name for name, gate in GATES.items() if gate.uses_advantages and gate.vanishes])
def test_a_gate_that_vanishes_is_zero_without_advantage(name):
    """In value and derivative, on every branch."""
    s, x, logp = (torch.linspace(-6, 4, 401, dtype=torch.float64, requires_grad=True) for _ in range(3))
    t = torch.arange(1.0, 402, dtype=torch.float64)
    value = gates_under_test()[name].value(s, x, logp, torch.zeros(401, dtype=torch.float64), t)
    grads = torch.autograd.grad(value.sum(), (s, x, logp), allow_unused=True)
    assert value.count_nonzero() == 0
    assert all(grad is None or grad.count_nonzero() == 0 for grad in grads)


@FAST
@pytest.mark.parametrize("rows", [50, 9])
@pytest.mark.parametrize("objective", ["grpo", "ctpo", "gspo"])
def test_clipped_tokens_leave_the_backward(objective, rows, backend, cut, computed):
    case = settled(objective, functools.partial(make, spread=3.0))
    found = check(objective, case, backend, torch.float32, memory_budget=budget_of(case, rows))
    with_gradient = found["hidden"].any(-1).sum()
    assert found["passes"] == 1 and 0 < with_gradient < 7 / 8 * found["tokens"]
    assert sum(computed["forward"]) == found["tokens"] and len(computed["forward"]) == len(cut[-1])
    assert sum(computed["kept"]) == with_gradient or rows == 9


@FAST
def test_a_batch_that_is_clipped_whole_has_no_gradient(backend, computed):
    case = make()
    sign = case["advantages"].sign()[:, None] + (case["advantages"] == 0)[:, None]
    found = run("ppo", case | {"old_logp": case["logp"].nan_to_num() - sign}, backend, torch.float32)
    assert computed["kept"] == [0] and found["loss"] != 0
    assert all(found[name].count_nonzero() == 0 for name in ("hidden", "weight", "bias"))
