"""A distribution against its own tempered self, and soft labels: what divergences of one head give."""

import pytest
import torch

import tokenrl

TEMPERATURE = 2.0


def logits_of(seed=0):
    return torch.randn(4, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("attached", [False, True])
def test_kl_of_the_tempered_self(attached):
    """KL(q || p), q = softmax(z / T): p - q where q is a constant, and (q / T)(log q / p - KL) on top where not."""
    z = logits_of()
    found = tokenrl.token_divergence(z, z if attached else z.detach(), other_temperature=TEMPERATURE)
    log_p, log_q = (x.detach().log_softmax(-1) for x in (z, z / TEMPERATURE))
    value = (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(found, value)
    expected = log_p.exp() - log_q.exp()
    if attached:
        expected = expected + log_q.exp() / TEMPERATURE * (log_q - log_p - value[:, None])
    (grad,) = torch.autograd.grad(found.sum(), z)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(grad, expected)


def test_kl_of_the_tempered_self_from_hidden_states():
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in ((5, 3), (9, 3)))
    frozen = hidden.detach(), weight.detach()
    found = tokenrl.linear_token_divergence(hidden, weight, *frozen, other_temperature=TEMPERATURE)
    logits = hidden @ weight.t()
    expected = tokenrl.token_divergence(logits, logits.detach(), other_temperature=TEMPERATURE)
    torch.testing.assert_close(found, expected)
    for got, wanted in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (found, expected)), strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted)


def test_soft_labels_given_sparsely():
    """-sum q_v log p_v of some ids: the gradient is (sum q) p - q; over a whole row it is distillation_loss's."""
    z, q = logits_of(), torch.tensor([[0.5, 0.2, 0.1]] * 4, dtype=torch.float64)
    ids = torch.tensor([[3, 1, 8]] * 4)
    how = {"cu_seqlens": torch.tensor([0, 4])}
    logp = tokenrl.token_logprobs(z, ids, outputs=["logp"]).logp
    loss, values = tokenrl.topk_distillation_loss("soft_ce", logp, q.log(), rest="truncated", **how)
    dense = torch.zeros_like(z).scatter(-1, ids, q)
    torch.testing.assert_close(values, -(dense * z.log_softmax(-1)).sum(-1).detach())
    expected = (0.8 * z.softmax(-1) - dense).detach() / 4
    (grad,) = torch.autograd.grad(loss, z)
    assert expected.any()
    torch.testing.assert_close(grad, expected)
    whole, _ = tokenrl.distillation_loss("soft_ce", z, (dense / 0.8).log(), **how)
    torch.testing.assert_close(0.8 * whole, loss)
    torch.testing.assert_close(0.8 * torch.autograd.grad(whole, z)[0], grad)
