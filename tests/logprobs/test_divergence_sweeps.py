"""Divergences whose maxima move while a row is read: later blocks outgrow the first, or the first have no weight."""

import pytest
import torch
from cases import backends_to_test, device_of, kernel_backends

import tokenrl
from tokenrl.instruments.parity import close

VOCAB = 5003
KINDS = ["forward_kl", "reverse_kl", "cross_entropy", "jsd"]
LEAST = torch.finfo(torch.float32).min
EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
# The interpreter subtracts -inf from itself, and multiplies 0 by it, before it selects.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def rows():
    """Both heads' logits: rising together by 400, against each other, one of them alone; masked at first, by -inf or by
    the least number, in both heads; and by -inf in one, which the other gives no weight to speak of, once and while
    that one outgrows its first block."""
    g = torch.Generator().manual_seed(0)
    p, r = torch.randn(2, 8, VOCAB, generator=g)
    ramp = torch.linspace(0, 400, VOCAB)
    p[0], r[0] = p[0] + ramp, r[0] + ramp
    # Not further apart: near to disjoint, what is left of a jsd's gradient is a small difference.
    p[1], r[1] = p[1] + ramp / 100, r[1] - ramp / 100
    r[2] += ramp / 20
    p[3, :3000] = r[3, :3000] = -torch.inf
    p[4, :3000] = r[4, :3000] = LEAST
    p[5, 2100:] += 1000
    r[5, :2100], r[5, 2100:] = -torch.inf, r[5, 2100:] + 20
    for masked, other, row in ((p, r, 6), (r, p, 7)):
        masked[row, :4200] = -torch.inf
        other[row, 2100:4200] += 1000
        other[row, 4200:] += 3000
    return p, r


def run(kind, backend, dtype):
    """(value, gradients of both)."""
    leaves = [x.to(device_of(backend), dtype).requires_grad_() for x in rows()]
    value = tokenrl.token_divergence(*leaves, kind, backend=backend)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", kernel_backends())
def test_maxima_that_move(kind, backend):
    results = (run(kind, name, dtype) for name, dtype in (
        (backend, torch.float32), ("reference", torch.float64), ("reference", torch.float32)
    ))  # fmt: skip
    for what, found, truth, base in zip(("value", "gradient", "of the other"), *results, strict=True):
        assert truth.isfinite().all() and truth.any()
        for row in range(len(truth)):
            close(found[row].cpu(), truth[row], base[row], f"{what}, row {row}")


@EVERY_BACKEND
def test_an_entry_that_one_head_lacks_before_its_maximum(backend):
    """Infinite where the other gives it weight; where that weight is out of range, none."""
    p, r = torch.zeros(2, 2, VOCAB, dtype=torch.float64, device=device_of(backend))
    p[:, 1] = -torch.inf
    p[:, 4000] = 10
    r[:, 4000] = torch.tensor([10.0, 2000.0])
    value = tokenrl.token_divergence(p, r, "forward_kl", backend=backend)
    assert value[0] == torch.inf and value[1].isfinite()


@EVERY_BACKEND
def test_a_kind_is_the_same_alone_and_after_others(backend):
    pair = [x[:3].to(device_of(backend)) for x in rows()]
    both = tokenrl.token_divergence(*pair, ["jsd", "forward_kl", "total_variation"], backend=backend)
    for kind, value in zip(("jsd", "forward_kl", "total_variation"), both, strict=True):
        assert torch.equal(value, tokenrl.token_divergence(*pair, kind, backend=backend)) and value.any()
