"""Cases that users of other systems reported, in numbers by hand: each right here, on every backend."""

import math

import pytest
import torch
from cases import backends_to_test, device_of, to_rounding

import tokenrl

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())


@EVERY_BACKEND
def test_a_gradient_in_place_of_logits_that_are_turned(backend):
    """TransformerEngine#2734: [S, B, V].transpose(0, 1), as of its copy; rows lie further apart than V."""
    g, found = torch.Generator().manual_seed(0), []
    z, ids = torch.randn(4, 3, 9, generator=g).to(device_of(backend)), torch.randint(0, 9, (3, 4), generator=g)
    for how in ("copy", "view", "in place"):
        leaf = z.clone().requires_grad_()
        turned = (leaf * 1).transpose(0, 1)
        inplace = how == "in place" and backend != "reference"
        stats = tokenrl.token_logprobs(
            turned.contiguous() if how == "copy" else turned,
            ids.to(z.device),
            inplace_backward=inplace,
            backend=backend,
        )
        (grad,) = torch.autograd.grad(stats.logp.sum() + stats.entropy.square().sum(), leaf)
        found.append((stats.logp.detach(), stats.entropy.detach(), grad))
    for other in found[1:]:
        for one, x in zip(found[0], other, strict=True):
            to_rounding(x, one)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_entropy_of_sure_rows_is_not_negative(dtype, backend):
    """trl#2022: peaks of up to 60, half of the rows with a large common offset."""
    g = torch.Generator().manual_seed(0)
    z, ids = torch.randn(16, 300, generator=g) * 0.1, torch.zeros(16, dtype=torch.int64)
    z[torch.arange(16), torch.randint(0, 300, (16,), generator=g)] += torch.linspace(0, 60, 16)
    z[8:] += 500 if dtype == torch.float16 else 5000
    z, log_p = z.to(dtype).to(device_of(backend)), z.to(dtype).double().log_softmax(-1)
    right, ids = -(log_p.exp() * log_p).sum(-1), ids.to(z.device)
    tiles = tokenrl.linear_token_logprobs(
        z.float(), torch.eye(300, device=z.device), ids, memory_budget=1 << 20, backend=backend
    )
    for found in (tokenrl.token_logprobs(z, ids, backend=backend).entropy, tiles.entropy):
        assert (found >= 0).all()
        torch.testing.assert_close(found.cpu().double(), right, rtol=0, atol=5e-6)


@EVERY_BACKEND
@pytest.mark.parametrize("how", ["ids", "row_mask"])
def test_ignored_rows_of_minus_infinity_poison_nothing(how, backend):
    """Rows 0 and 1 keep two ids: logp log(1/2), entropy log 2, gradients p - 1[id] in them."""
    base = torch.full((5, 6), -math.inf, device=device_of(backend))
    base[:2, :2] = 0
    leaf, ids = torch.zeros_like(base).requires_grad_(), torch.tensor([0, 1, -1, -1, -1], device=base.device)
    more = {"ignore_index": -1} if how == "ids" else {"row_mask": ids >= 0}
    stats = tokenrl.token_logprobs(leaf + base, ids if how == "ids" else ids.clamp(min=0), backend=backend, **more)
    (grad,) = torch.autograd.grad(stats.logp.sum() + 0.3 * stats.entropy.sum(), leaf)
    half = torch.zeros(5, 6)
    half[0, :2], half[1, :2] = torch.tensor([0.5, -0.5]), torch.tensor([-0.5, 0.5])
    to_rounding(stats.logp.detach().cpu(), torch.tensor([-math.log(2)] * 2 + [0.0] * 3))
    to_rounding(stats.entropy.detach().cpu(), torch.tensor([math.log(2)] * 2 + [0.0] * 3))
    to_rounding(grad.cpu(), half)
