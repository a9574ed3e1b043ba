"""Bits of the linear ops: where the GEMM is exact, a token's log-prob is one number however it is computed."""

import pytest
import torch
from cases import device_of, kernel_backends
from linear_cases import make_exact

import tokenrl

FAST = pytest.mark.parametrize("backend", [name for name in kernel_backends() if name not in ("triton", "sim")])
COUNT, VOCAB = 200, 9973  # more columns than a tile of the cache has, and no multiple of a vector
WHOLE = 80 * VOCAB * 4  # bytes of three chunks


def head(backend, dtype):
    hidden, weight, bias, ids = make_exact(COUNT, vocab=VOCAB, dtype=dtype)
    return [x.to(device_of(backend)) for x in (hidden / 4, weight, bias, ids)]


@FAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_of_parts_budgets_and_outputs(dtype, backend):
    hidden, weight, bias, ids = head(backend, dtype)

    def logp(rows=slice(None), **how):
        found = tokenrl.linear_token_logprobs(hidden[rows], weight, ids[rows], bias=bias, backend=backend, **how)
        return found.logp

    whole = logp()
    assert torch.equal(whole, tokenrl.token_logprobs(hidden @ weight.t() + bias, ids, backend=backend).logp)
    assert torch.equal(whole, logp(memory_budget=WHOLE))
    assert torch.equal(whole, logp(outputs=("logp", "rank")))
    assert all(torch.equal(whole[rows], logp(rows)) for rows in (slice(0, 1), slice(3, 100), slice(150, 200)))


@FAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["ppo", "ctpo", "gspo"])
@pytest.mark.parametrize("budget", [None, WHOLE])
def test_the_on_policy_ratio_is_1(budget, objective, dtype, backend):
    hidden, weight, bias, ids = head(backend, dtype)
    mask = torch.arange(COUNT, device=ids.device) % 7 != 2
    how = {"bias": bias, "memory_budget": budget, "backend": backend}
    old_logp = tokenrl.linear_token_logprobs(hidden, weight, ids, row_mask=mask, **how).logp
    more = {"cu_seqlens": torch.tensor([0, 70, 140, COUNT], device=ids.device), "mask": mask}
    advantages = torch.ones(3, device=ids.device)
    given = (hidden.requires_grad_(), weight, ids, old_logp, advantages)
    loss, metrics = tokenrl.linear_policy_loss(objective, *given, **more, **how)
    assert metrics.passes == 1 and metrics.ratio_min == metrics.ratio_max == 1 and metrics.approx_kl == 0
    (grad,) = torch.autograd.grad(loss, hidden)
    own, _ = tokenrl.linear_policy_loss(objective, *given, on_policy=True, **more, **how)
    assert torch.equal(grad, torch.autograd.grad(own, hidden)[0]) and grad.any() and not grad[~mask].any()
