"""Top-K divergences and DHPO's entropy weight against their formulas in loops, and their edges."""

import math

import pytest
import torch
from golden_data import near

from tokenrl.methods.dhpo import entropy_mix
from tokenrl.methods.topk_divergence import KINDS, topk_divergence

VOCAB = 11


def policies(seed=0, rows=5, width=6, dtype=torch.float64):
    """(log-probs [B, T, V] of both, mask with holes, an empty row and a row of one token)."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, width, VOCAB, generator=g, dtype=torch.float64) * 1.5
    logits[0] += 1.5 * logits[1]
    mask = torch.rand(rows, width, generator=g) < 0.7
    mask[1], mask[2] = False, torch.arange(width) == 3
    new, old = logits.log_softmax(-1).to(dtype)
    return new, old, mask, torch.randint(0, VOCAB, mask.shape, generator=g)


def top(new, old, k):
    """The K most likely of the old policy: (log-probs of both, ids)."""
    ids = old.topk(k).indices
    return new.gather(-1, ids), old.gather(-1, ids), ids


def by_hand(new, old, ids, mask, kind, extra=None):
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for j, t in mask.nonzero().tolist():
        kept = ids[j, t].tolist()
        if extra is not None and int(extra[j, t]) not in kept:
            kept.append(int(extra[j, t]))
        p, mu = ([math.exp(float(x[j, t, v])) for v in kept] for x in (new, old))
        rest, rest_mu = (max(1 - sum(x), 0.0) for x in (p, mu))
        if kind == "tv":
            out[j, t] = (sum(abs(a - b) for a, b in zip(p, mu, strict=True)) + abs(rest - rest_mu)) / 2
        else:
            out[j, t] = sum(b * math.log(b / a) for a, b in zip(p, mu, strict=True))
            out[j, t] += rest_mu * math.log((rest_mu + 1e-8) / (rest + 1e-8))
    return out


def sampled(new, old, ids):
    return {name: x.gather(-1, ids[..., None])[..., 0] for name, x in (("logp", new), ("old_logp", old))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, VOCAB])
def test_it_is_its_formula(kind, k):
    for seed in range(3):
        new, old, mask, ids = policies(seed)
        x, y, ids_topk = top(new, old, k)
        garbage = [torch.where(mask[..., None], t, math.nan) for t in (x, y)]
        found = topk_divergence(*garbage, kind=kind, mask=mask)
        # Sums to 1 leave a rest of some 1e-16, and the logarithm of a rest to 1e-8 of its own.
        torch.testing.assert_close(found, by_hand(new, old, ids_topk, mask, kind), rtol=1e-9, atol=1e-14)
        assert not found[~mask].any()
        one = {name: torch.where(mask, t, math.inf) for name, t in sampled(new, old, ids).items()}
        found = topk_divergence(*garbage, kind=kind, mask=mask, ids_topk=ids_topk, ids=ids, **one)
        expected = by_hand(new, old, ids_topk, mask, kind, extra=ids)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
        if k == 3:
            assert (expected != by_hand(new, old, ids_topk, mask, kind)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_it_grows_with_k_to_the_full_divergence(kind):
    new, old, *_ = policies()
    every = [topk_divergence(*top(new, old, k)[:2], kind=kind) for k in range(1, VOCAB + 1)]
    for fewer, more in zip(every, every[1:], strict=False):
        assert (fewer <= more + 1e-7).all() and (fewer < more).any()
    full = {"tv": 0.5 * (new.exp() - old.exp()).abs().sum(-1), "kl": (old.exp() * (old - new)).sum(-1)}[kind]
    torch.testing.assert_close(every[-1], full, rtol=1e-9, atol=1e-12)
    assert topk_divergence(old[..., :4], old[..., :4], kind=kind).abs().max() < 1e-12


def test_one_bucket_is_the_binary_divergence():
    new, old, mask, ids = policies()
    x, y = sampled(new, old, ids).values()
    p, mu = x.exp(), y.exp()
    near(topk_divergence(x[..., None], y[..., None]), (p - mu).abs(), "tv")
    kl = mu * (y - x) + (1 - mu) * ((1 - mu + 1e-8) / (1 - p + 1e-8)).log()
    near(topk_divergence(x[..., None], y[..., None], kind="kl"), kl, "kl")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_parts_and_dtypes(kind):
    new, old, mask, ids = policies()
    x, y, ids_topk = top(new, old, 3)
    given = {"ids_topk": ids_topk, "ids": ids, **sampled(new, old, ids)}
    whole = topk_divergence(x, y, kind=kind, mask=mask, **given)
    cu = torch.arange(len(mask) + 1) * mask.shape[1]
    flat = topk_divergence(
        x.flatten(0, 1), y.flatten(0, 1), kind=kind, mask=mask.flatten(), cu_seqlens=cu,
        **{name: t.flatten(0, 1) for name, t in given.items()},
    )  # fmt: skip
    near(flat.view(mask.shape), whole, "packed", 1e-12)  # the sums are torch's, which promises no bits
    parts = [
        topk_divergence(x[s], y[s], kind=kind, mask=mask[s], **{name: t[s] for name, t in given.items()})
        for s in (slice(2), slice(2, 5))
    ]
    near(torch.cat(parts), whole, "parts", 1e-12)
    single = topk_divergence(x.float(), y.float(), kind=kind, mask=mask)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), topk_divergence(x, y, kind=kind, mask=mask), rtol=1e-5, atol=1e-6)
    # In fp32 the K = V log-probs sum to 1 only nearly, on either side.
    full = topk_divergence(new.float(), old.float(), kind=kind, mask=mask)
    torch.testing.assert_close(full.double(), topk_divergence(new, old, kind=kind, mask=mask), rtol=1e-5, atol=1e-6)


def test_buckets_without_probability():
    sure = torch.tensor([[[0.0, -math.inf]]], dtype=torch.float64)
    half = torch.full((1, 1, 2), math.log(0.5), dtype=torch.float64)
    outside = torch.tensor([[[math.log(0.25)] * 2]], dtype=torch.float64)
    for x, y, tv, kl in (
        (sure, sure, 0.0, 0.0),
        (half, sure, 0.5, math.log(2)),
        (sure, half, 0.5, math.inf),
        (outside, half, 0.5, math.log(2)),
        (half, outside, 0.5, 0.5 * math.log(0.5) + 0.5 * math.log((0.5 + 1e-8) / 1e-8)),
    ):
        assert topk_divergence(x, y).item() == pytest.approx(tv, abs=1e-12)
        assert topk_divergence(x, y, kind="kl").item() == pytest.approx(kl, abs=1e-12)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 3)])
def test_batches_without_a_valid_token(shape):
    x, mask = torch.full((*shape, 2), math.nan), torch.zeros(shape, dtype=torch.bool)
    for kind in KINDS:
        found = topk_divergence(x, x, kind=kind, mask=mask)
        assert found.shape == shape and not found.any()
    assert not entropy_mix(x[..., 0], mask=mask).any()


LOGP, INDEX = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64)
ALL = {"ids_topk": INDEX, "ids": INDEX[..., 0], "logp": LOGP[..., 0], "old_logp": LOGP[..., 0]}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "klu"}, "kind: .*Did you mean 'kl'"),
        ({"logp_topk": LOGP[0]}, r"logp_topk: got shape \[3, 4\], accepted: \[B, T, K\]"),
        ({"logp_topk": LOGP[..., :0]}, r"logp_topk: got shape \[2, 3, 0\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"logp_topk: got shape .*\[N, K\] with cu_seqlens"),
        ({"old_logp_topk": LOGP[..., :2]}, r"old_logp_topk: got shape \[2, 3, 2\]"),
        ({"old_logp_topk": LOGP.bfloat16()}, "old_logp_topk: got dtype torch.bfloat16"),
        ({"logp_topk": LOGP.clone().requires_grad_()}, "logp_topk: got .*requires grad"),
        ({"mask": INDEX[..., 0]}, "mask: got dtype torch.int64"),
        ({**ALL, "old_logp": None}, "old_logp: got None, accepted: all of"),
        ({"ids": INDEX[..., 0]}, "ids_topk: got None"),
        ({**ALL, "ids": LOGP[..., 0]}, "ids: got dtype torch.float32"),
        ({**ALL, "ids_topk": INDEX[..., :2]}, r"ids_topk: got shape \[2, 3, 2\]"),
        ({**ALL, "ids": INDEX[:1, :, 0]}, r"ids: got shape \[1, 3\]"),
        ({**ALL, "logp": LOGP[..., 0].clone().requires_grad_()}, "logp: got .*requires grad"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        topk_divergence(**{"logp_topk": LOGP, "old_logp_topk": LOGP, **options})


def entropies():
    new, _, mask, _ = policies(3)
    return torch.where(mask, -(new.exp() * new).sum(-1), math.nan), mask


def test_entropy_mix_is_its_formula():
    entropy, mask = entropies()
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    lowest, highest = torch.zeros(len(mask), dtype=torch.float64), torch.ones(len(mask), dtype=torch.float64)
    for j in range(len(mask)):
        row = entropy[j, mask[j]].tolist()
        for t in mask[j].nonzero()[:, 0].tolist():
            expected[j, t] = (float(entropy[j, t]) - min(row)) / (max(row) - min(row) + 1e-8)
        if row:
            lowest[j], highest[j] = min(row), max(row)
    found = entropy_mix(entropy, mask=mask)
    near(found, expected, "weight")
    assert ((found >= 0) & (found <= 1)).all() and found.amax() > 0.99 and not found[2].any(), "one token: 0"
    cu = torch.arange(len(mask) + 1) * mask.shape[1]
    assert torch.equal(entropy_mix(entropy.flatten(), mask=mask.flatten(), cu_seqlens=cu).view(mask.shape), found)
    # A response in two parts, with its extremes.
    parts = [
        entropy_mix(entropy[:, s], mask=mask[:, s], lowest=lowest, highest=highest) for s in (slice(2), slice(2, 9))
    ]
    assert torch.equal(torch.cat(parts, 1), found)
    assert entropy_mix(entropy.float(), mask=mask).dtype == torch.float32


def test_entropy_mix_with_extremes_of_ones_own():
    entropy = torch.tensor([[0.5, 1.0, 3.0], [2.0, 2.0, 2.0]])
    found = entropy_mix(entropy, lowest=1.0, highest=torch.tensor(2.0), eps=0.0)
    assert found.tolist() == [[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]
    assert not entropy_mix(entropy)[1].any()
    for options, message in (
        ({"lowest": torch.zeros(3)}, r"lowest: got shape \[3\]"),
        ({"highest": torch.zeros(2, requires_grad=True)}, "highest: got .*requires grad"),
        ({"entropy": entropy.clone().requires_grad_()}, "entropy: got .*requires grad"),
        ({"entropy": entropy[0]}, "entropy: got shape .*without cu_seqlens"),
    ):
        with pytest.raises(ValueError, match=message):
            entropy_mix(**{"entropy": entropy, **options})
