"""A row of logits has the same bits alone, anywhere in a batch, and in both passes."""

import pytest
import torch
from cases import device_of, kernel_backends

import tokenrl

EVERY_KERNEL = pytest.mark.parametrize("backend", kernel_backends())
OUTPUTS = ("logp", "entropy", "log_sum_sq_probs", "max_prob", "mean_logit")


def run(logits, ids, backend, outputs):
    logits = logits.to(device_of(backend)).clone().requires_grad_()
    found = tokenrl.token_logprobs(logits, ids.to(logits.device), outputs=outputs, backend=backend)
    (grad,) = torch.autograd.grad(found.logp.sum() + 0.1 * found.entropy.sum(), logits)
    return [x.detach().cpu() for x in (*found, grad)]


@EVERY_KERNEL
@pytest.mark.parametrize("vocab", [33, 257, 1000, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("outputs", [OUTPUTS[:2], OUTPUTS], ids=["plain", "everything"])
def test_a_row_alone_is_the_row_among_others(outputs, dtype, vocab, backend):
    """With a vocabulary that 16 bytes do not divide each row begins at another place between two multiples of them."""
    g = torch.Generator().manual_seed(0)
    logits, ids = (torch.randn(7, vocab, generator=g) * 3).to(dtype), torch.randint(0, vocab, (7,), generator=g)
    whole = run(logits, ids, backend, outputs)
    for i in range(7):
        alone = run(logits[i : i + 1], ids[i : i + 1], backend, outputs)
        for name, x, y in zip((*outputs, "gradient"), whole, alone, strict=True):
            assert torch.equal(x[i], y[0]), (name, i)
