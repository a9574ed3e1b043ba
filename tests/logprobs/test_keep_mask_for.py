"""Outputs that see a keep_mask beside outputs that do not, in one call, against torch."""

import pytest
import torch
from cases import backends_to_test, device_of

import tokenrl

NAMES = ("entropy", "logp", "lse", "rank")
EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())


def made(backend):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(3, 2, generator=g, dtype=torch.float64), torch.randn(37, 2, generator=g).double())
    ids, keep = torch.tensor([4, 0, 36]), torch.rand(3, 37, generator=g) > 0.4
    keep[torch.arange(3), ids] = True
    upstream = torch.randn(2, 3, generator=g, dtype=torch.float64)
    return [x.to(device_of(backend)) for x in (hidden, weight, ids, keep, upstream)]


def by_torch(logits, ids, keep):
    """(log-prob and lse of what is kept, entropy of all, rank among what is kept), temperature 0.7"""
    z = logits / 0.7
    kept, whole = z.masked_fill(~keep, -torch.inf), z.log_softmax(-1)
    logp = kept.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    rank = 1 + (kept > kept.gather(-1, ids[:, None])).sum(-1)
    return -(whole.exp() * whole).sum(-1), logp, kept.logsumexp(-1), rank


@EVERY_BACKEND
@pytest.mark.parametrize("linear", [False, True])
def test_the_others_see_the_whole_vocabulary(linear, backend):
    hidden, weight, ids, keep, upstream = made(backend)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    options = {"keep_mask": keep, "keep_mask_for": ("logp", "lse", "rank"), "outputs": NAMES, "temperature": 0.7}
    if linear:
        found = tokenrl.linear_token_logprobs(hidden, weight, ids, backend=backend, **options)
    else:
        found = tokenrl.token_logprobs(hidden @ weight.T, ids, backend=backend, **options)
    expected = by_torch(hidden @ weight.T, ids, keep)
    grads = []
    for entropy, logp, lse, _ in (found, expected):
        grads.append(torch.autograd.grad((upstream[0] * (logp + lse**2) + upstream[1] * entropy).sum(), leaves))
    for one, other in zip([*found, *grads[0]], [*expected, *grads[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    alone = tokenrl.token_logprobs(hidden @ weight.T, ids, backend=backend, **options | {"keep_mask_for": NAMES})
    assert not torch.allclose(alone.entropy, found.entropy)


def test_errors_of_keep_mask_for():
    hidden, weight, ids, keep, _ = made("reference")
    for outputs in ("entropy", ("rank",)):
        with pytest.raises(ValueError, match="^keep_mask_for: got .*, accepted: some of outputs, logp, entropy,"):
            tokenrl.token_logprobs(hidden @ weight.T, ids, keep_mask=keep, keep_mask_for=outputs)
    with pytest.raises(ValueError, match="^keep_mask_for: got .*, accepted: .* beside a keep_mask"):
        tokenrl.linear_token_logprobs(hidden, weight, ids, keep_mask_for=("logp",))
    logits, split = (hidden @ weight.T).requires_grad_() * 1, {"keep_mask": keep, "keep_mask_for": ("logp",)}
    with pytest.raises(ValueError, match="^inplace_backward: got True with outputs on both sides of keep_mask_for"):
        tokenrl.token_logprobs(logits, ids, inplace_backward=True, backend="cpu", **split)
