"""linear_policy_loss gives the log-probs and entropies it has made: detached, of the shape of ids, 0 where none was."""

import pytest
import torch
from cases import backends_to_test, device_of

import tokenrl
from tokenrl.ops.linear import directions, policy_loss

# One pass in one chunk; in several; cut at sequences; anywhere, of a frozen head; two passes; a form, by way of all
# log-probs.
WAYS = {
    "one chunk": ("grpo", None),
    "chunks": ("grpo", 3),
    "spans": ("gspo", 7),
    "frozen": ("gspo", 3),
    "twice": ("gspo", 3),
    "form": ("gmpo", 3),
    "form, frozen": ("gmpo", 3),
}


@pytest.mark.parametrize("backend", backends_to_test())
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("way", WAYS)
def test_log_probs_and_entropies_are_given(way, packed, backend, monkeypatch):
    for cut in (policy_loss, directions):
        monkeypatch.setattr(cut, "FEWEST_TOKENS", 2)
    objective, rows = WAYS[way]
    device, g = device_of(backend), torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=g).to(device) for shape in ((3, 5, 4), (2000, 4)))
    ids, old = torch.randint(0, 2000, (3, 5), generator=g).to(device), torch.full((3, 5), -7.6, device=device)
    mask = (torch.arange(5) < torch.tensor([[5], [3], [4]])).to(device)
    advantages = torch.tensor([1.0, 0.0, -1.0], device=device)
    # Sequences without advantage enter no GEMM, unless another term or a form wants them.
    made = mask & (advantages != 0)[:, None] if objective == "grpo" or way in ("spans", "frozen", "twice") else mask
    where = {"mask": mask}
    if packed:
        flat = mask.flatten()
        hidden, ids, old, made = (x.reshape(15, *x.shape[2:])[flat] for x in (hidden, ids, old, made))
        where = {"cu_seqlens": torch.tensor([0, 5, 8, 12], device=device)}
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_(way not in ("frozen", "form, frozen"))
    budget = None if rows is None else rows * (4 * (2000 + 4) + 128)
    _, metrics = tokenrl.linear_policy_loss(
        objective, hidden, weight, ids, old, advantages, backend=backend, memory_budget=budget, **where
    )
    expected = tokenrl.linear_token_logprobs(hidden.detach(), weight, ids, row_mask=made, backend=backend)
    for found, of_all in ((metrics.logp, expected.logp), (metrics.token_entropy, expected.entropy)):
        assert found.shape == ids.shape and not found.requires_grad
        assert torch.equal(found != 0, made)
        torch.testing.assert_close(found, of_all, rtol=1e-5, atol=1e-5)
    if backend != "reference":
        assert metrics.passes == (2 if way in ("twice", "form") else 1)


@pytest.mark.parametrize("backend", backends_to_test())
def test_sequences_without_advantage_are_computed_where_asked(backend):
    device, g = device_of(backend), torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=g).to(device).requires_grad_() for shape in ((3, 5, 4), (50, 4)))
    ids, old = torch.randint(0, 50, (3, 5), generator=g).to(device), torch.full((3, 5), -4.0, device=device)
    advantages, found = torch.tensor([1.0, 0.0, -1.0], device=device), []
    for way in ("skip", "compute"):
        loss, metrics = tokenrl.linear_policy_loss(
            "grpo", hidden, weight, ids, old, advantages, without_advantage=way, backend=backend
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
        assert (metrics.tokens, metrics.left_out) == ((10, 5) if way == "skip" else (15, 0))
        assert bool((metrics.logp[1] != 0).all()) == (way == "compute")
    for skipped, computed in zip(*found, strict=True):
        torch.testing.assert_close(skipped, computed, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="^without_advantage: got 'none', accepted: skip, compute"):
        tokenrl.linear_policy_loss("grpo", hidden, weight, ids, old, advantages, without_advantage="none")
