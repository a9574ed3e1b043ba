"""sft_loss, linear_sft_loss, linear_multi_token_loss: cross entropy of torch, GEMMs of kept tokens alone, CAFT."""

import math

import pytest
import torch
from cases import backends_to_test, device_of, interpreted, kernel_backends
from gemms import gemms

import tokenrl
from tokenrl import sft_weights

B, T, D, V, K = 3, 8, 6, 31, 3
BACKENDS = [name for name in backends_to_test() if not interpreted(name)]  # there is no kernel of its own
CPU = pytest.mark.skipif("cpu" not in kernel_backends(), reason="the C++ backend is not built")


def batch(device="cpu", dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((B, T, D), (V, D), (V,)))
    mask = torch.rand(B, T, generator=g) > 0.4
    ids = torch.randint(0, V, (B, T), generator=g)
    token_weight = torch.rand(B, T, generator=g, dtype=torch.float64)
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)]
    return leaves, ids.to(device), mask.to(device), token_weight.to(device, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_is_torchs_cross_entropy(aggregation, backend):
    (hidden, weight, bias), ids, mask, token_weight = batch(device_of(backend))
    logits = hidden @ weight.t() + bias
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(B, T)
    share = mask / mask.sum() if aggregation == "token-mean" else mask / mask.sum(1, keepdim=True) / B
    expected = (share * token_weight * nll).sum()
    spoiled = torch.where(mask, ids, -7)
    how = {"mask": mask, "token_weight": token_weight, "aggregation": aggregation, "backend": backend}
    logp = tokenrl.token_logprobs(logits, ids, outputs=["logp"], backend=backend).logp
    read = torch.where(mask[..., None], hidden, torch.nan)
    found, metrics = tokenrl.linear_sft_loss(read, weight, spoiled, bias=bias, **how)
    for loss in (tokenrl.sft_loss(torch.where(mask, logp, torch.nan), **how)[0], found):
        torch.testing.assert_close(loss, expected)
        grads = [torch.autograd.grad(x, (hidden, weight, bias), retain_graph=True) for x in (loss, expected)]
        for got, wanted in zip(*grads, strict=True):
            assert wanted.any()
            torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(metrics.logp, torch.where(mask, -nll, 0).detach())
    packed = {key: x[mask] if torch.is_tensor(x) else x for key, x in how.items() if key != "mask"}
    boundaries = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    loss, _ = tokenrl.linear_sft_loss(hidden[mask], weight, ids[mask], bias=bias, cu_seqlens=boundaries, **packed)
    torch.testing.assert_close(loss, expected)


@CPU
def test_only_kept_tokens_enter_a_gemm():
    """Forward and backward: of 24 tokens the n that ssToken keeps; logits that are kept are not computed again."""
    (hidden, weight, _), ids, mask, _ = batch(dtype=torch.float32)
    logp = tokenrl.linear_token_logprobs(hidden, weight, ids, row_mask=mask, outputs=["logp"]).logp.detach()
    kept = tokenrl.token_selection.sstoken_mask(logp, -torch.rand(B, T), torch.rand(B, T), rho=0.5, mask=mask)
    n = int(kept.sum())
    assert 0 < n < mask.sum()
    (loss, _), forward = gemms(lambda: tokenrl.linear_sft_loss(hidden, weight, ids, mask=kept, backend="cpu"))
    _, backward = gemms(loss.backward)
    assert forward == {((n, D), (D, V)), ((n, V), (V, D)), ((V, n), (n, D))} and backward == set()
    assert hidden.grad[kept].any() and not hidden.grad[~kept].any()
    hidden.grad = None
    stats, forward = gemms(
        lambda: tokenrl.linear_token_logprobs(hidden, weight, ids, row_mask=kept, outputs=["logp"], backend="cpu")
    )
    loss, _ = tokenrl.sft_loss(stats.logp, mask=kept)
    _, backward = gemms(loss.backward)
    assert forward == {((n, D), (D, V))} and backward == {((n, V), (V, D)), ((V, n), (n, D))}


def streams_by_hand(hidden, weight, ids, coefs, mask, rows):
    total = 0
    for i, coef in enumerate(coefs):
        terms = [
            -(hidden[i, t] @ weight.t()).log_softmax(-1)[ids[t + i]]
            for t in range(len(ids) - i)
            if mask[t + i] and rows[t] == rows[t + i]
        ]
        total = total + coef * sum(terms) / max(len(terms), 1)
    return total


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_of_later_tokens(backend):
    """CAFT's sum, padded and packed."""
    (_, weight, _), ids, mask, _ = batch(device_of(backend))
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(K, B, T, D, generator=g, dtype=torch.float64).to(ids.device).requires_grad_()
    coefs = [1.0, 0.5, -0.25]
    rows = torch.arange(B).repeat_interleave(T)
    flat = (hidden.flatten(1, 2), weight, ids.flatten(), coefs, mask.flatten())
    padded = tokenrl.linear_multi_token_loss(hidden, weight, ids, coefs, mask=mask, backend=backend)
    packed_rows = torch.tensor([0] * 5 + [1] * (B * T - 6) + [2])
    packed = tokenrl.linear_multi_token_loss(
        *flat[:4], mask=flat[4], cu_seqlens=torch.tensor([0, 5, B * T - 1, B * T], device=ids.device), backend=backend
    )
    for (loss, metrics), of_rows in ((padded, rows), (packed, packed_rows)):
        expected = streams_by_hand(*flat, of_rows)
        torch.testing.assert_close(loss, expected)
        grads = [torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected)]
        for got, wanted in zip(*grads, strict=True):
            assert wanted.any()
            torch.testing.assert_close(got, wanted)
        assert metrics.logp.shape[0] == K


def test_streams_without_tokens_and_global_counts():
    (_, weight, _), ids, mask, _ = batch()
    hidden = torch.randn(K, B, T, D, dtype=torch.float64)
    hidden[1] = torch.nan  # its coefficient is 0
    hidden[0, ~mask] = torch.nan
    loss, _ = tokenrl.linear_multi_token_loss(hidden, weight, ids, [1.0, 0.0, 0.5], mask=mask)
    counts = torch.tensor([mask.sum(), 1, mask[:, 2:].sum()])
    twice, _ = tokenrl.linear_multi_token_loss(
        hidden, weight, torch.where(mask, ids, -100), [1.0, 0.0, 0.5], normalizer=counts / 2
    )
    assert loss.isfinite() and loss > 0
    torch.testing.assert_close(twice, 2 * loss)
    short = tokenrl.linear_multi_token_loss(torch.randn(K, B, 1, D).double(), weight, ids[:, :1], [0.0, 1.0, 1.0])[0]
    assert short == 0  # no token is so far
    with pytest.raises(ValueError, match=r"^hidden: got .* accepted: \[2, 3, 8, D\], a stream per coefficient"):
        tokenrl.linear_multi_token_loss(hidden, weight, ids, [1.0, 0.5])
    for coefs in ([], 1.0):
        with pytest.raises(ValueError, match="^coefs: got .* accepted: numbers, one per stream of hidden"):
            tokenrl.linear_multi_token_loss(hidden, weight, ids, coefs)
    with pytest.raises(ValueError, match="^normalizer: got .* accepted: a count per stream"):
        tokenrl.linear_multi_token_loss(hidden, weight, ids, [1.0] * K, normalizer=counts[:2])


def test_cafts_coefficients():
    at = {"decay": 0.8, "scale": 0.01, "heads": 2}
    first = {"constant": 1.0, "linear": 0.3, "sine": math.sin(0.15 * math.pi), "rsine": math.sin(0.35 * math.pi)}
    for schedule, expected in first.items():
        found = sft_weights.caft_coefs(3, 10, schedule=schedule, **at)
        assert found == pytest.approx([1.0, 0.008 * expected, 0.0064 * expected])
    assert sft_weights.caft_coefs(3, 10, schedule="sine", ratio=0.1, **at) == pytest.approx([1.0, 0.008, 0.0064])
    assert sft_weights.caft_coefs(0, 10) == pytest.approx([1, 0.008, 0.0064, 0.00512, 0.004096])
    with pytest.raises(ValueError, match="^schedule: got 'cosine', accepted: constant, linear, sine, rsine"):
        sft_weights.caft_coefs(0, 10, schedule="cosine")
    with pytest.raises(ValueError, match="^heads: got 1.5, accepted: a whole number, at least 0"):
        sft_weights.caft_coefs(0, 10, heads=1.5)


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_tokens_are_not_weighed_by_a_count_of_none(count):
    with pytest.raises(ValueError, match="^count: got 0.0, accepted: a number above 0; 2 of tokens are to be weighed"):
        sft_weights.nll_weights(torch.tensor([True, True, False]), coef=0.1, count=count)
    assert not sft_weights.nll_weights(torch.zeros(3, dtype=torch.bool), coef=0.1, count=count).any()
