"""InTRO and AKL: formulas in loops, exact expectations, from hidden states, errors."""

import math

import pytest
import torch

import tokenrl
from tokenrl.methods import akl, intro

B, T, V, D = 2, 4, 7, 3


def models(seed=0):
    """Logits of both, [B, T, V], ids and a mask with a hole."""
    g = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, B, T, V, generator=g, dtype=torch.float64) * 2
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 1] = False
    return logits, other, torch.randint(0, V, (B, T), generator=g), mask


def logps(x, ids):
    return tokenrl.token_logprobs(x, ids, outputs=["logp"]).logp


def sampled_loss(logits, other, ids, mask, **more):
    logp = logps(logits, ids)
    weights = intro.log_weights(logp, logps(other, ids), **more)
    return tokenrl.topk_distillation_loss(intro.SAMPLED, logp, weights, rest="truncated", mask=mask)[0]


def test_intro_in_a_loop():
    logits, other, ids, mask = models()
    logits.requires_grad_()
    drawn = intro.candidates(logits, ids, 5, row_mask=mask, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn[mask][:, 0], ids[mask]) and (drawn[~mask] == -100).all()
    found = sampled_loss(logits, other, drawn, mask, ceiling=1.5)
    p, r, total, bounded = logits.log_softmax(-1), other.log_softmax(-1), 0, 0
    for j in range(B):
        at = mask[j].nonzero().flatten().tolist()
        for t in at:
            for a in drawn[j, t].tolist():
                w = min((r[j, t, a] - p[j, t, a]).exp().item(), 1.5)
                bounded += w == 1.5
                total = total - w * p[j, t, a] / 5 / len(at) / B
    assert bounded
    torch.testing.assert_close(found, total)
    grads = [torch.autograd.grad(x, logits)[0] for x in (found, total)]
    assert grads[1].any()
    torch.testing.assert_close(*grads)


def test_the_expectation_of_intros_gradient_is_the_exact_one():
    """Over one candidate a ~ pi, each token of the vocabulary as often as pi draws it: D(posterior || pi)."""
    logits, other, ids, mask = models()
    logits.requires_grad_()
    (exact,) = torch.autograd.grad(tokenrl.distillation_loss(intro.EXACT, logits, other, mask=mask)[0], logits)
    expected = torch.zeros_like(exact)
    for a in range(V):
        loss = sampled_loss(logits, other, torch.full_like(ids, a)[..., None], mask, ceiling=1e9)
        expected += logits.detach().softmax(-1)[..., a, None] * torch.autograd.grad(loss, logits)[0]
    assert exact.any()
    torch.testing.assert_close(expected, exact)


def test_candidates_are_drawn_from_the_model():
    logits = torch.tensor([[[0.0, math.log(3), -torch.inf]]]).expand(1, 500, 3)
    ids = torch.zeros(1, 500, dtype=torch.int64)
    drawn = intro.candidates(logits, ids, 3, generator=torch.Generator().manual_seed(0), memory_budget=16 * 3 * 60)
    assert (drawn[..., 0] == 0).all() and (drawn != 2).all()
    assert (drawn[..., 1:] == 1).float().mean() == pytest.approx(0.75, abs=0.05)
    assert intro.candidates(logits, ids, 1).shape == (1, 500, 1)
    hidden, weight = torch.ones(1, 500, 1), torch.tensor([[0.0], [2 * math.log(3)], [-100]])
    how = {"generator": torch.Generator().manual_seed(0), "memory_budget": 16 * 3 * 60}
    assert torch.equal(drawn, intro.linear_candidates(hidden, weight, ids, 3, temperature=2.0, **how))


def test_head_share_in_a_loop():
    logits, other, _, mask = models()
    other[0, 0] = torch.tensor([9.0, 0, 0, 0, 0, 0, 0])  # its first id alone is above the mass
    logits[1, 3] = other[1, 3]
    logits[0, 1] = torch.nan
    found = akl.head_share(logits, other, mass=0.6, row_mask=mask)
    assert found[0, 1] == 0 and found[1, 3] == 0
    for j, t in mask.nonzero().tolist():
        p, r = logits[j, t].softmax(-1), other[j, t].softmax(-1)
        head, apart, sums = 0.0, (p - r).abs(), 0.0
        for n, v in enumerate(r.argsort(descending=True).tolist()):
            sums += r[v].item()
            head += apart[v].item() if n == 0 or sums <= 0.6 else 0
        assert found[j, t].item() == pytest.approx(head / max(apart.sum().item(), 1e-300), rel=1e-9), (j, t)


def test_head_share_from_hidden_states():
    g = torch.Generator().manual_seed(2)
    shapes = ((B, T, D), (V, D), (B, T, 5), (V, 5), (V,))
    hidden, weight, other_hidden, other_weight, bias = (
        torch.randn(*s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes
    )
    expected = akl.head_share(hidden @ weight.t() + bias, other_hidden @ other_weight.t())
    found = akl.linear_head_share(hidden, weight, other_hidden, other_weight, bias=bias, memory_budget=2000)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


LOGITS, OTHER, IDS, MASK = models()
ERRORS = {
    "n": (lambda: intro.candidates(LOGITS, IDS, 0), "n: got 0, accepted: an integer from 1 to 7, the vocabulary"),
    "ids": (lambda: intro.candidates(LOGITS, IDS[1:]), r"ids: got torch.int64 \[1, 4\], accepted: int32 or int64"),
    "logits": (lambda: intro.candidates(LOGITS.long(), IDS), "logits: got a torch.Tensor of torch.int64"),
    "ceiling": (lambda: intro.log_weights(LOGITS, OTHER, ceiling=0), "ceiling: got 0, accepted: a number above 0"),
    "posterior": (
        lambda: intro.log_weights(LOGITS, OTHER.clone().requires_grad_()), "posterior_logp: got a tensor that requires"
    ),
    "shape": (lambda: intro.log_weights(LOGITS, OTHER[1:]), r"posterior_logp: got shape \[1, 4, 7\], accepted: that"),
    "mass": (lambda: akl.head_share(LOGITS, OTHER, mass=2), r"mass: got 2, accepted: a number in \[0, 1\]"),
    "other": (lambda: akl.head_share(LOGITS, OTHER[1:]), r"other_logits: got shape \[1, 4, 7\], accepted: that of"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
