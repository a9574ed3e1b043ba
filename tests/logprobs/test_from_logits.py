"""token_logprobs on every backend: each output and its gradient, alone and together, from one logit to 150 000."""

import itertools

import numpy as np
import pytest
import torch
from cases import device_of, interpreted, kernel_backends, thinned
from logit_cases import DIFFERENTIABLE, DTYPES, check, make, run
from torch.profiler import ProfilerActivity, profile

import tokenrl
from tokenrl.logprobs.from_logits import OUTPUTS

KERNELS = kernel_backends()
SUBSETS = [names for n in range(1, 5) for names in itertools.combinations(DIFFERENTIABLE, n)]
EVERY_KERNEL = pytest.mark.parametrize("backend", KERNELS)
CPU = pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ backend is not built")
# The interpreter multiplies -inf by 0 before it selects.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab,temperature", [(1, 1.0), (2, 1.0), (7, 0.7), (1003, 1.3), (5000, 1.0)])
def test_all_outputs_together(vocab, temperature, dtype, backend):
    check(*make(4, vocab, dtype=dtype), backend, temperature=temperature)


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OUTPUTS)
def test_each_output_alone(name, dtype, backend):
    check(*make(3, 301, dtype=dtype), backend, outputs=(name,))


@EVERY_KERNEL
@pytest.mark.parametrize("pulled", SUBSETS, ids="+".join)
def test_every_combination_of_gradients(pulled, backend):
    """Asked for alone, or together with outputs that have no upstream gradient."""
    logits, ids = make(3, 65)
    check(logits, ids, backend, outputs=pulled)
    check(logits, ids, backend, outputs=OUTPUTS, pulled=pulled)


@EVERY_KERNEL
@pytest.mark.parametrize("outputs", [("rank", "lse", "logp"), ("max_prob", "entropy"), OUTPUTS[::-1]], ids="+".join)
def test_results_come_in_the_order_asked_for(outputs, backend):
    logits, ids = (x.to(device_of(backend)) for x in make(3, 65))
    stats = tokenrl.token_logprobs(logits, ids, outputs=outputs, backend=backend)
    every = tokenrl.token_logprobs(logits, ids, outputs=OUTPUTS, backend=backend)
    for name, value in zip(outputs, stats, strict=True):
        assert value is getattr(stats, name) and torch.equal(value, getattr(every, name)), name


def test_an_output_that_was_not_asked_for_is_no_attribute():
    stats = tokenrl.token_logprobs(*make(3, 65), outputs=("rank",))
    with pytest.raises(AttributeError, match="no 'logp'; this call asked for outputs rank"):
        _ = stats.logp


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_several_ids_per_row(shape, dtype, backend):
    """Duplicates count each; an ignored id gives 0; a row of ignored ids gives zeros and is never read."""
    logits, ids = make(*shape, 401, dtype=dtype, k=5)
    flat, rows = ids.view(4, 5), logits.view(4, 401)
    flat[0, 3] = flat[0, 1]
    flat[1, [0, 4]] = -100
    flat[2] = -100
    rows[2] = torch.nan
    found = check(logits, ids, backend)
    assert all(found[name].view(4, -1)[2].count_nonzero() == 0 for name in OUTPUTS)
    assert found["gradient"].view(4, -1)[2].count_nonzero() == 0
    assert found["logp"].view(4, 5)[1, [0, 4]].count_nonzero() == 0


@EVERY_KERNEL
@pytest.mark.parametrize("k", [1, 2, 40])
def test_any_number_of_ids(k, backend):
    """One id per row, [N] or [N, 1], is the same call; there may be more ids than logits."""
    logits, ids = make(3, 29, k=k)
    found = check(logits, ids, backend)
    if k == 1:
        flat = run(logits, ids[:, 0], backend)
        assert all(torch.equal(flat[name], x.view(flat[name].shape)) for name, x in found.items())


@EVERY_KERNEL
@pytest.mark.parametrize("pulled", [("logp",), DIFFERENTIABLE], ids="+".join)
def test_rows_without_upstream_gradient(pulled, backend):
    """Their gradient is 0, next to rows that have one."""
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0])
    grad = check(*make(4, 1201), backend, pulled=pulled, weight=weight)["gradient"]
    assert grad[weight == 0].count_nonzero() == 0 and grad[weight != 0].any(1).all()


@EVERY_KERNEL
def test_strided_views_are_read_in_place(backend):
    """Views of [B, T, V]; what lies between their rows plays no part: it is NaN here."""
    whole, ids = make(3, 6, 101)
    for at in (np.s_[:, :-1], np.s_[:, 1::2], np.s_[:, :, 3:97], np.s_[1:, 2:4, 5:6]):
        view = whole[at]
        rows = ids[at[:2]] % view.shape[2]
        outside = torch.full_like(whole, torch.nan)
        outside[at] = view
        check(outside[at], rows, backend)
    none = torch.zeros(0, 2, 9, 2)[..., 0].requires_grad_()  # contiguous by its own account
    ids_of_none = torch.zeros(0, 2, dtype=torch.int64)
    (grad,) = torch.autograd.grad(tokenrl.token_logprobs(none, ids_of_none, backend=backend).logp.sum(), none)
    assert grad.shape == none.shape
    turned = whole.transpose(0, 1)
    check(turned, ids.transpose(0, 1), backend)
    tall = whole[:, :, :9] if interpreted(backend) else whole
    tall = tall.transpose(1, 2)
    check(tall, torch.zeros(tall.shape[:2], dtype=torch.int64), backend, outputs=("logp", "rank"))


@EVERY_KERNEL
@pytest.mark.parametrize("rows,vocab", [(1, 151936), (2, 70001), (3, 131072 + 3), (1, 300000)])
def test_few_rows_and_a_long_vocabulary(rows, vocab, backend):
    """Rows that several threads or programs share."""
    dtype = torch.bfloat16 if rows == 1 else torch.float32
    rows = rows if backend == "cpu" else 1
    check(*make(rows, vocab, dtype=dtype), backend)


@EVERY_KERNEL
@pytest.mark.parametrize("shape", [(1, 70001), (5, 300)])
def test_the_same_call_gives_the_same_bits(shape, backend):
    first, second = (run(*make(*shape), backend) for _ in range(2))
    assert all(torch.equal(first[name], x) for name, x in second.items())


@CPU
@pytest.mark.parametrize("shape", [(1, 151936), (2, 70001), (300, 1003)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(shape, dtype):
    logits, ids = make(*shape, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(run(logits, ids, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], x) for name, x in found[1].items())


@pytest.mark.parametrize("axis,backend", [(axis, b) for b in kernel_backends() for axis in thinned([0, 1], b)])
def test_row_offsets_beyond_32_bits(axis, backend):
    """Two rows 2^31 + 77 logits apart, along either stride: 4 GB that is mapped but hardly touched."""
    if device_of(backend).type != "cpu":
        pytest.skip("would copy 4 GB to the GPU")
    apart, vocab = 2**31 + 77, 501
    storage = torch.from_numpy(np.zeros(apart + vocab, dtype=np.int16)).view(torch.bfloat16)
    rows, ids = make(2, vocab, dtype=torch.bfloat16)
    storage[:vocab], storage[apart:] = rows
    shape, strides = ((2, 1), (apart, vocab)) if axis == 0 else ((1, 2), (vocab, apart))
    far, near = storage.as_strided((*shape, vocab), (*strides, 1)), rows.view(*shape, vocab)
    far, near = (tokenrl.token_logprobs(x, ids.view(shape), outputs=OUTPUTS, backend=backend) for x in (far, near))
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def allocated(call) -> int:
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profiled.key_averages())


@CPU
def test_what_is_allocated():
    """The forward its outputs only, whatever is asked for; the backward the gradient; in place, nothing."""
    leaf = torch.randn(64, 20000).requires_grad_()
    logits, size = leaf * 1, leaf.numel() * leaf.element_size()
    options = {"softcap": 30.0, "temperature": torch.ones(64), "keep_mask": torch.rand(20000) > 0.1}

    def forward(inplace_backward=False):
        return tokenrl.token_logprobs(
            logits, torch.zeros(64, 2, dtype=torch.int64), outputs=OUTPUTS, backend="cpu", **options,
            inplace_backward=inplace_backward,
        )  # fmt: skip

    def step(inplace_backward):
        stats = forward(inplace_backward)
        torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), logits)

    assert allocated(forward) < 0.01 * size
    assert 0.99 * size < allocated(lambda: step(False)) < 1.02 * size
    assert allocated(lambda: step(True)) < 0.02 * size
