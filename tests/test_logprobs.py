"""token_logprobs: values and gradients on every backend, hard logits, strided views, and what the forward allocates."""

import pytest
import torch
from cases import device_of, kernel_backends
from torch.profiler import ProfilerActivity, profile

import tokenrl
from tokenrl.parity import close

KERNELS = kernel_backends()
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make(rows: int, vocab: int, dtype, seed: int = 0, scale: float = 3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=g, dtype=torch.float64) * scale).to(dtype)
    ids = torch.randint(0, vocab, (rows,), generator=g)
    return logits, ids, *(torch.randn(rows, generator=g, dtype=torch.float64) for _ in range(2))


def run(logits, ids, upstream, backend, temperature):
    """logp, entropy, and the gradient of both with the given upstream gradients."""
    device = device_of(backend)
    z = logits.to(device).requires_grad_()
    logp, entropy = tokenrl.token_logprobs(z, ids.to(device), temperature=temperature, backend=backend)
    grads = [g.to(device, logp.dtype).view(ids.shape) for g in upstream]
    (grad,) = torch.autograd.grad([logp, entropy], z, grads)
    return logp.detach().cpu(), entropy.detach().cpu(), grad.cpu()


def check(logits, ids, upstream, backend, temperature=1.0):
    """By the tolerance rule; the truth is fp64 on the same, already rounded logits."""
    truth = run(logits.double(), ids, upstream, "reference", temperature)
    base = run(logits, ids, upstream, "reference", temperature)
    kernel = run(logits, ids, upstream, backend, temperature)
    for name, *values in zip(("logp", "entropy", "gradient"), kernel, truth, base, strict=True):
        close(*values, what=f"{backend} {name}")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab,temperature", [(2, 1.0), (7, 0.7), (1003, 1.3), (5000, 1.0)])
def test_values_and_gradients(vocab, temperature, dtype, backend):
    logits, ids, *upstream = make(5, vocab, dtype)
    check(logits, ids, upstream, backend, temperature)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_real_vocabulary(backend):
    logits, ids, *upstream = make(3, 151936, torch.bfloat16)
    check(logits, ids, upstream, backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("hard", ["masked", "one finite", "offset", "lowest first", "ignored"])
def test_hard_rows(hard, backend):
    logits, ids, *upstream = make(4, 1501, torch.float32, seed=1)
    if hard == "masked":
        logits[:, 5:900] = -torch.inf
        ids[:] = 1000
    elif hard == "one finite":
        keep = logits.gather(1, ids[:, None])
        logits = torch.full_like(logits, -torch.inf).scatter(1, ids[:, None], keep)
    elif hard == "offset":
        logits += 1e4
    elif hard == "lowest first":
        logits[:, :1200] = torch.finfo(torch.float32).min
        ids[:] = 1300
    else:
        ids[1:3] = -100
        logits[1] = torch.nan
    check(logits, ids, upstream, backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_an_id_of_minus_infinity_has_a_finite_gradient(backend):
    logits, ids, *upstream = make(2, 33, torch.float64)
    logits[:, 4], ids[:] = -torch.inf, 4
    check(logits, ids, [upstream[0], torch.zeros(2)], backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_views_are_read_in_place(backend):
    g = torch.Generator().manual_seed(2)
    whole = torch.randn(3, 6, 101, generator=g)
    ids = torch.randint(0, 101, (3, 5), generator=g)
    upstream = [torch.randn(3, 5, generator=g, dtype=torch.float64) for _ in range(2)]
    for view in (whole[:, :-1], whole.transpose(0, 1)[:3].transpose(0, 1)[:, :3], whole[..., 3:97]):
        rows = ids[:, : view.shape[1]]
        trimmed = torch.nn.functional.pad(rows, (0, view.shape[1] - rows.shape[1])) % view.shape[2]
        check(view, trimmed, [torch.ones(trimmed.shape, dtype=torch.float64)] * 2, backend)
    contiguous = run(whole[:, :-1].contiguous(), ids, upstream, backend, 1.0)
    for a, b in zip(run(whole[:, :-1], ids, upstream, backend, 1.0), contiguous, strict=True):
        close(a, b.double(), b)


@pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ backend is not built")
def test_the_forward_allocates_its_outputs_only():
    logits = torch.randn(64, 20000).requires_grad_()
    ids = torch.zeros(64, dtype=torch.int64)
    tokenrl.token_logprobs(logits, ids, backend="cpu")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tokenrl.token_logprobs(logits, ids, backend="cpu")
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiled.key_averages())
    assert allocated < 0.01 * logits.numel() * logits.element_size()
