"""What linear_token_logprobs computes and holds: its GEMMs, its memory, its sums, main_grad, and traced graphs."""

import pytest
import torch
from cases import device_of, kernel_backends
from gemms import gemms
from linear_cases import VALUES, budget_of, make, make_exact, references, run, same_bits
from logit_cases import DTYPES

import tokenrl
from bench.measure import peak_memory
from tokenrl.instruments.parity import close, errors
from tokenrl.logprobs.from_logits import OUTPUTS
from tokenrl.ops.linear import token_logprobs

KERNELS = kernel_backends()
EVERY_KERNEL = pytest.mark.parametrize("backend", KERNELS)
CPU = pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ backend is not built")


def leaves(*shape, frozen=(), **more):
    """(hidden, weight, bias, ids) that want gradients but for the frozen ones."""
    *tensors, ids = make(*shape, **more)
    named = zip(("hidden", "weight", "bias"), tensors, strict=True)
    return *(x if x is None else x.requires_grad_(name not in frozen) for name, x in named), ids


@CPU
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight")], ids="+".join)
@pytest.mark.parametrize("budget", [None, 100_000], ids=["logits fit", "logits do not fit"])
def test_only_rows_and_gradients_that_are_wanted_enter_a_gemm(budget, frozen, bias):
    """Of 12 rows 7 are used and 5 of these have an upstream gradient; a frozen tensor costs no GEMM, and logits that
    fit into the budget beside the tiles of their gradient are not computed again."""
    hidden, weight, offsets, ids = leaves(12, frozen=frozen)
    row_mask, wanted = torch.arange(12) % 2 == 0, torch.arange(12) < 9
    row_mask[3] = True
    stats, forward = gemms(
        lambda: tokenrl.linear_token_logprobs(
            hidden, weight, ids, bias=offsets if bias else None, row_mask=row_mask, memory_budget=budget, backend="cpu"
        )
    )
    logits, of_hidden, of_weight = ((5, 24), (24, 301)), ((5, 301), (301, 24)), ((301, 5), (5, 24))
    assert forward == {((7, 24), (24, 301))}
    wanted[4] = False
    loss = torch.where(wanted, stats.logp, 0).sum() + torch.where(wanted, stats.entropy, 0).sum()
    if not bias and len(frozen) == 2:
        assert not loss.requires_grad
        return
    _, backward = gemms(loss.backward)
    again = {logits} if budget else set()
    costs = again | {shape for name, shape in (("hidden", of_hidden), ("weight", of_weight)) if name not in frozen}
    assert backward == costs
    assert (hidden.grad is None, weight.grad is None) == ("hidden" in frozen, "weight" in frozen)


@EVERY_KERNEL
@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("hidden", "weight")], ids="+".join)
def test_a_frozen_tensor_changes_no_other_gradient(frozen, backend):
    case = make_exact(5)
    every, some = run(*case, backend), run(*case, backend, frozen=frozen)
    assert set(every) - set(some) == {*frozen}
    same_bits(some, every)


@CPU
def test_under_no_grad_nothing_is_kept():
    hidden, weight, bias, ids = leaves(5)
    with torch.no_grad():
        stats = tokenrl.linear_token_logprobs(hidden, weight, ids, bias=bias, backend="cpu")
    assert not stats.logp.requires_grad and stats.logp.grad_fn is None
    given = (hidden.detach(), weight.detach(), ids)
    assert peak_memory(lambda: tokenrl.linear_token_logprobs(*given, backend="cpu"), "cpu") < 2 * 4 * 5 * 301


@CPU
def test_logits_are_kept_where_they_fit():
    """One head's: two, where a mask splits the outputs, would take the budget twice."""
    hidden, weight, _, ids = leaves(5)
    keep = torch.ones(301, dtype=torch.bool)
    for kept, more in (
        (True, {}), (False, {"memory_budget": 100_000}),
        (False, {"keep_mask": keep, "keep_mask_for": ("logp",)}),
    ):  # fmt: skip
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.shape), lambda x: x):
            tokenrl.linear_token_logprobs(hidden, weight, ids, backend="cpu", **more)
        assert ((5, 301) in saved) == kept


@EVERY_KERNEL
@pytest.mark.parametrize("masked", [False, True])
def test_kept_logits_give_the_gradients_of_those_computed_again(masked, backend):
    """To a rounding of torch's sums; the same bits by each backward of a retained graph."""
    case, used = make_exact(9), torch.arange(9) % 3 != 1
    pulled = torch.where(torch.arange(9) == 3, 0.0, 1.0)
    more = {"rows": pulled} | ({"row_mask": used} if masked else {})
    again, kept = (run(*case, backend, memory_budget=budget, **more) for budget in (80_000, None))
    same_bits(kept, again)
    hidden, weight, bias, ids = (x.to(device_of(backend)) for x in case)
    hidden.requires_grad_(), weight.requires_grad_()
    logp = tokenrl.linear_token_logprobs(hidden, weight, ids, bias=bias, backend=backend).logp
    first, second = (torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# What is summed is written once: a dtype is enough for the kernels that are interpreted.
PAIRS = [(backend, dtype) for backend in KERNELS for dtype in DTYPES if backend == "cpu" or dtype == torch.bfloat16]


@pytest.mark.parametrize("backend,dtype", PAIRS)
@pytest.mark.parametrize("many_tiles", [False, True])
def test_main_grad_gets_what_weight_grad_does_not(many_tiles, backend, dtype):
    """The gradient is added to what is there, in fp32 whatever the weight is in, by each backward again."""
    case = make_exact(9, vocab=300, width=4, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    prior = torch.randn(300, 4, generator=torch.Generator().manual_seed(4), dtype=wide)
    main_grad = prior.to(device_of(backend), copy=True)
    budget = budget_of(case[1], 3) if many_tiles else None
    truth, base = (found["weight"] for found in references(*case))
    plain = run(*case, backend, memory_budget=budget)
    for times in (1, 2):
        found = run(*case, backend, memory_budget=budget, main_grad=main_grad)
        assert found.pop("weight") is None
        same_bits(found, plain, torchs=found)  # sums over tiles are torch's
        close(main_grad.cpu(), prior.double() + times * truth, prior + times * base.to(wide), what=f"{times} times")


@EVERY_KERNEL
def test_main_grad_of_a_frozen_weight_stays(backend):
    main_grad = torch.ones(301, 24, device=device_of(backend))
    run(*make(5), backend, main_grad=main_grad, frozen=("weight",))
    assert (main_grad == 1).all()


@CPU
def test_the_weight_keeps_no_grad_beside_main_grad():
    hidden, weight, bias, ids = leaves(5)
    main_grad = torch.zeros(301, 24)
    for _ in range(2):
        tokenrl.linear_token_logprobs(hidden, weight, ids, main_grad=main_grad, backend="cpu").logp.sum().backward()
    assert weight.grad is None and hidden.grad is not None and main_grad.any()


ROWS, VOCAB, BUDGET = 256, 20000, 2 << 20
BF16 = {"dtype": torch.bfloat16}
HEADS = {
    "fp32": {},
    "bf16": BF16,
    "an fp32 head of bf16": {**BF16, "compute_dtype": torch.float32},
    "the order": {"outputs": OUTPUTS},
    "the order, of an fp32 head of bf16": {**BF16, "compute_dtype": torch.float32, "outputs": OUTPUTS},
    "a mask": {"keep_mask": torch.ones(VOCAB, dtype=torch.bool)},
    "a mask per row": {"keep_mask": torch.ones(ROWS, VOCAB, dtype=torch.bool)},
    "softcap and temperatures": {"temperature": torch.ones(ROWS), "softcap": 9.0},
    "few columns": {**BF16, "vocab": 4000},
    "logits that fit": {"vocab": 1000},
    "logits that fit, in bf16": {**BF16, "vocab": 2000},
}


@CPU
@pytest.mark.parametrize("head", HEADS)
def test_what_is_held_stays_within_the_budget(head):
    """Beyond inputs and results, kept logits among them; where these do not fit, it never holds them as eager does."""
    options = {"dtype": torch.float32, "vocab": VOCAB, "outputs": VALUES, **HEADS[head]}
    dtype, vocab, outputs = (options.pop(name) for name in ("dtype", "vocab", "outputs"))
    *tensors, ids = leaves(ROWS, width=64, vocab=vocab, dtype=dtype)
    hidden, weight, bias = tensors

    def forward(backend):
        return tokenrl.linear_token_logprobs(
            hidden, weight, ids, bias=bias, outputs=outputs, memory_budget=BUDGET, backend=backend, **options
        )

    def step(backend):
        stats = forward(backend)
        return stats, torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), tensors)

    results = sum(x.nbytes for x in forward("cpu")) + 2 * 4 * ROWS  # lse and what it lost are kept for the backward
    grads = sum(x.nbytes for x in tensors)
    assert peak_memory(lambda: forward("cpu"), "cpu") - results <= BUDGET
    held = peak_memory(lambda: step("cpu"), "cpu") - results - grads
    assert held <= BUDGET
    if vocab == VOCAB:
        assert held < ROWS * vocab * dtype.itemsize
    if head in ("fp32", "bf16"):
        assert peak_memory(lambda: step("reference"), "cpu") - results - grads > ROWS * vocab * dtype.itemsize


@CPU
def test_tiles_of_all_rows_stay_within_the_budget():
    """A tile's cast weights and the sum of their gradient are gone before the next tile's."""
    budget = 10 << 20
    hidden, weight, ids = (torch.randn(64, 256), torch.randn(20011, 256), torch.randint(0, 20011, (64,)))
    tensors = [x.to(torch.bfloat16).requires_grad_() for x in (hidden, weight)]

    def step():
        stats = tokenrl.linear_token_logprobs(
            *tensors, ids, memory_budget=budget, compute_dtype=torch.float32, backend="cpu"
        )
        return stats, torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), tensors)

    assert peak_memory(step, "cpu") - sum(x.nbytes for x in tensors) - 4 * 4 * 64 <= budget


TOKENS = 100_000


@CPU
def test_many_small_gradients_add_up_in_fp32(monkeypatch):
    """1e5 tokens whose gradients point the same way: in bf16 most of them would round to nothing."""
    hidden, weight, _, ids = make(TOKENS, width=8, vocab=64, dtype=torch.bfloat16)
    hidden, ids = hidden.abs(), ids * 0
    seen, choose = [], token_logprobs.tiles_of
    monkeypatch.setattr(
        token_logprobs, "tiles_of", lambda *inputs, **more: seen.append(choose(*inputs, **more)) or seen[-1]
    )

    def gradient(backend, hidden, weight, ids, **more):
        leaf = weight.clone().requires_grad_()
        stats = tokenrl.linear_token_logprobs(hidden, leaf, ids, outputs=("logp",), backend=backend, **more)
        return torch.autograd.grad(stats.logp, leaf, torch.full_like(stats.logp, 1e-5), allow_unused=True)[0]

    truth = gradient("reference", hidden.double(), weight.double(), ids)
    base = gradient("reference", hidden, weight, ids)
    main_grad = torch.zeros(64, 8)
    gradient("cpu", hidden, weight, ids, memory_budget=140_000, main_grad=main_grad)
    rounded = gradient("cpu", hidden, weight, ids, memory_budget=140_000)
    rows = seen[-1].rows
    assert rows <= TOKENS // 100
    close(main_grad, truth, base)
    close(rounded, truth, base)
    in_bf16 = torch.zeros_like(weight)
    for some in token_logprobs.split(TOKENS, rows):
        in_bf16 += gradient("reference", hidden[some], weight, ids[some])
    worst = [max(error for _, error, _ in errors(x, truth, base)) for x in (rounded, in_bf16)]
    assert worst[1] > 10 * worst[0]


def head_loss(hidden, weight, bias, ids, backend):
    stats = tokenrl.linear_token_logprobs(
        hidden, weight, ids, bias=bias, temperature=0.8, row_mask=ids != 3, outputs=OUTPUTS, backend=backend
    )
    return stats.logp.sum() - 0.1 * stats.entropy.mean() + stats.lse.sum(), stats.rank


@EVERY_KERNEL
def test_one_graph_for_every_number_of_rows(backend):
    compiled = torch.compile(head_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5, 8):
        case = [x.to(device_of(backend)) for x in leaves(rows, vocab=65, seed=rows)]
        tensors = [x.detach().requires_grad_() for x in case[:3]]
        (eager, rank), (traced, traced_rank) = (f(*tensors, case[3], backend) for f in (head_loss, compiled))
        torch.testing.assert_close(eager, traced)
        assert torch.equal(rank, traced_rank)
        expected, found = (torch.autograd.grad(loss, tensors) for loss in (eager, traced))
        torch.testing.assert_close(expected, found)


@EVERY_KERNEL
def test_double_backward_raises(backend):
    hidden, weight, bias, ids = (x.to(device_of(backend)) for x in make(3, vocab=65))
    hidden.requires_grad_()
    stats = tokenrl.linear_token_logprobs(hidden, weight, ids, bias=bias, backend=backend)
    (grad,) = torch.autograd.grad(stats.logp.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), hidden)
