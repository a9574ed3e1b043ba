"""Divergences over K ids: formulas in loops, K = V, lists from logits and hidden states, verl's function, errors."""

import math
from types import SimpleNamespace

import pytest
import torch
import verl_source

import tokenrl

RESTS = ("tail", "renormalised", "truncated")
KINDS = {
    "forward_kl": lambda p, r: r * math.log(r / p),
    "reverse_kl": lambda p, r: p * math.log(p / r),
    "total_variation": lambda p, r: abs(p - r) / 2,
    "cross_entropy": lambda p, r: -r * math.log(p),
}


def models(rows=5, vocab=11, seed=0):
    """Logits of both, [N, V]."""
    g = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, rows, vocab, generator=g, dtype=torch.float64) * 2
    return logits, logits + other


def lists(logits, other, ids):
    return [tokenrl.token_logprobs(x, ids, outputs=["logp"]).logp for x in (logits, other)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rest", RESTS)
def test_it_is_its_formula(rest, kind):
    logits, other = models()
    ids = tokenrl.topk_ids(other, 3)
    found = tokenrl.topk_token_divergence(*lists(logits, other, ids), kind, rest=rest)
    for n, value in enumerate(found.tolist()):
        pairs = [tuple(x[n].softmax(-1)[v].item() for x in (logits, other)) for v in ids[n]]
        sums = [sum(each) for each in zip(*pairs, strict=True)]
        if rest == "tail":
            pairs.append(tuple(1 - s for s in sums))
        if rest == "renormalised":
            pairs = [tuple(x / s for x, s in zip(pair, sums, strict=True)) for pair in pairs]
        assert value == pytest.approx(sum(KINDS[kind](*pair) for pair in pairs), rel=1e-9), n


@pytest.mark.parametrize("kind", tokenrl.DIVERGENCES)
def test_all_ids_are_the_whole_vocabulary(kind):
    """Values and the gradients of both heads, whatever is done with the rest, which is nothing."""
    at = [x.requires_grad_() for x in models()]
    ids = torch.stack([torch.randperm(11) for _ in range(5)])
    expected = tokenrl.token_divergence(*at, kind)
    upstream = torch.arange(1.0, 6.0, dtype=torch.float64)
    truth = torch.autograd.grad(expected, at, upstream)
    for rest in RESTS:
        atol = 2e-7 if rest == "tail" else 1e-12  # its floor counts, as coefficient and total variation do
        found = tokenrl.topk_token_divergence(*lists(*at, ids), kind, rest=rest, tail_floor=1e-14)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=atol)
        for got, wanted in zip(torch.autograd.grad(found, at, upstream), truth, strict=True):
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_zero_outside_is_a_sum_over_the_vocabulary():
    logits, other = models()
    logits.requires_grad_()
    ids = tokenrl.topk_ids(other, 3)
    log_r = torch.full_like(other, -100).scatter(-1, ids, other.gather(-1, ids).log_softmax(-1))
    log_p = logits.log_softmax(-1)
    for kind, expected in (
        ("forward_kl", (log_r.exp() * (log_r - log_p)).sum(-1)), ("reverse_kl", (log_p.exp() * (log_p - log_r)).sum(-1))
    ):  # fmt: skip
        stats = tokenrl.token_logprobs(logits, ids, outputs=["logp", "entropy"])
        how = {"entropy": stats.entropy} if kind == "reverse_kl" else {}
        found = tokenrl.topk_token_divergence(stats.logp, other.gather(-1, ids), kind, rest="zero_outside", **how)
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (found, expected)]
        assert grads[1].abs().max() > 0.1
        torch.testing.assert_close(*grads)


def test_gradients_of_masked_and_infinite_entries():
    """Whatever an entry holds that is none, or a row that is left out; an id of probability 0 gets no gradient."""
    logits, other = models()
    other[0, 2] = -torch.inf
    ids, (good, wanted) = torch.tensor([[2, 0, 5, 7]] * 5), [x.log_softmax(-1) for x in (logits, other)]
    keep = torch.tensor([True, True, False, True]).expand(5, 4).clone()
    rows = torch.tensor([True, True, False, True, True])
    lists = [x.gather(-1, ids).masked_fill(~(keep & rows[:, None]), torch.nan) for x in (good, wanted)]
    p = lists[0].requires_grad_()
    for rest in RESTS:
        for kind in ("forward_kl", "jsd"):
            found = tokenrl.topk_token_divergence(p, lists[1], kind, rest=rest, topk_mask=keep, row_mask=rows)
            (grad,) = torch.autograd.grad(found.sum(), p)
            assert found[2] == 0 and not grad[2].any() and not grad[:, 2].any()
            short = p.detach()[:, [0, 1, 3]][rows].requires_grad_()
            expected = tokenrl.topk_token_divergence(short, lists[1][:, [0, 1, 3]][rows], kind, rest=rest)
            torch.testing.assert_close(found[rows], expected)
            (truth,) = torch.autograd.grad(expected.sum(), short)
            assert truth.any()
            torch.testing.assert_close(grad[:, [0, 1, 3]][rows], truth)
            floor = {"rest": rest, "logp_floor": -1.0}
            found = tokenrl.topk_token_divergence(p, lists[1], kind, topk_mask=keep, row_mask=rows, **floor)
            expected = tokenrl.topk_token_divergence(short, lists[1][:, [0, 1, 3]][rows], kind, **floor)
            torch.testing.assert_close(found[rows], expected)


def test_a_full_bucket_has_its_floor_and_no_gradient():
    """In fp32 the K of a sure model sum to 1 and a bit, where the divergence were infinite or no number."""
    p = torch.tensor([[0.7, 0.3]]).log().requires_grad_()
    r = torch.tensor([[0.5, 0.49]]).log()
    for kind in ("forward_kl", "reverse_kl"):
        found = tokenrl.topk_token_divergence(p, r, kind)
        (grad,) = torch.autograd.grad(found, p)
        assert found.isfinite() and grad.isfinite().all() and grad.any()


def test_lists_from_hidden_states():
    """The same loss and gradients as from logits; a chunk of a few rows at a time."""
    g = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((2, 9, 4), (13, 4), (13,)))
    mask = torch.rand(2, 9, generator=g) < 0.8
    other = torch.randn(2, 9, 13, generator=g, dtype=torch.float64)
    hidden[~mask] = torch.nan
    at = [x.requires_grad_() for x in (hidden, weight, bias)]
    logits = torch.where(mask[..., None], hidden, 0) @ weight.t() + bias
    ids = tokenrl.topk_ids(logits, 4, row_mask=mask)
    found = tokenrl.linear_topk_ids(*at[:2], 4, bias=bias, row_mask=mask, memory_budget=16 * 13 * 5)
    assert torch.equal(found, ids) and (ids[~mask] == -100).all() and (ids[mask] >= 0).all()
    losses = []
    for logp in (
        tokenrl.token_logprobs(logits, ids, outputs=["logp"]).logp,
        tokenrl.linear_token_logprobs(*at[:2], ids, bias=bias, outputs=["logp"]).logp,
    ):
        teacher = tokenrl.token_logprobs(other, ids, outputs=["logp"]).logp
        losses.append(tokenrl.topk_distillation_loss("reverse_kd", logp, teacher, mask=mask)[0])
    torch.testing.assert_close(*losses)
    for got, wanted in zip(*(torch.autograd.grad(loss, at) for loss in losses), strict=True):
        assert wanted.any()
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_ties_go_to_the_lower_id(dtype):
    logits = torch.randint(-3, 3, (40, 50), generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0], logits[1] = -torch.inf, 1
    expected = logits.argsort(dim=-1, descending=True, stable=True)
    for k in (1, 7, 50):
        assert torch.equal(tokenrl.topk_ids(logits, k), expected[:, :k])
        view = torch.cat([logits.view(8, 5, 50), torch.zeros(8, 1, 50, dtype=dtype)], 1)[:, :-1]
        assert torch.equal(tokenrl.topk_ids(view, k, memory_budget=16 * 50 * 3).view(40, k), expected[:, :k])
    logits[2:, 4] = torch.nan
    expected = torch.where(logits.isnan(), -torch.inf, logits).argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(tokenrl.topk_ids(logits, 7), expected[:, :7])


@pytest.mark.parametrize("shape,mask", [((0, 5), None), ((2, 3), torch.zeros(2, 3, dtype=torch.bool))])
def test_of_no_rows(shape, mask):
    logits = torch.full((*shape, 8), torch.nan, requires_grad=True)
    ids = tokenrl.topk_ids(logits, 3, row_mask=mask)
    assert ids.shape == (*shape, 3) and (ids == -100).all()
    logp = tokenrl.token_logprobs(logits, ids, row_mask=mask, outputs=["logp"]).logp
    loss, _ = tokenrl.topk_distillation_loss("kd", logp, logp.detach(), mask=mask)
    assert loss == 0 and not torch.autograd.grad(loss, logits)[0].any()


def test_both_lists_in_one():
    ids, mask = tokenrl.union_topk_ids(torch.tensor([[3, 1], [0, 2]]), torch.tensor([[1, 5], [4, 6]]))
    assert ids.tolist() == [[3, 1, 1, 5], [0, 2, 4, 6]]
    assert mask.tolist() == [[True, True, False, True], [True] * 4]


def test_the_loss_of_packed_lists_with_temperature_and_weights():
    logits, other = models(12)
    ids = tokenrl.topk_ids(other, 4)
    logp, teacher = lists(logits, other, ids)
    mask, weight = torch.rand(12, generator=torch.Generator().manual_seed(2)) < 0.7, torch.arange(12.0).double()
    how = {"mask": mask, "token_weight": weight, "aggregation": "seq-mean-token-mean", "temperature": 2.0}
    cu_seqlens = torch.tensor([0, 4, 12])
    found, values = tokenrl.topk_distillation_loss("kd", logp.requires_grad_(), teacher, cu_seqlens=cu_seqlens, **how)
    expected = tokenrl.topk_token_divergence(logp, teacher, row_mask=mask)
    means = [(4 * weight * expected)[at].sum() / mask[at].sum() for at in (slice(0, 4), slice(4, 12))]
    torch.testing.assert_close(found, sum(means) / 2)
    torch.testing.assert_close(values, expected.detach())
    got, wanted = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (found, sum(means) / 2))
    assert wanted.any()
    torch.testing.assert_close(got, wanted)


@pytest.mark.skipif(verl_source.folder() is None, reason="verl is not installed")
@pytest.mark.parametrize("floor", [None, -4.0])
def test_verl(floor):
    """verl's own compute_forward_kl_topk, which computes in fp32, and the clamps of its caller."""
    known = {"F": torch.nn.functional, "get_ulysses_sequence_parallel_world_size": lambda: 1}
    known |= {"DistillationConfig": object, "DistillationLossConfig": object}
    names = verl_source.named("compute_forward_kl_topk", "kl_divergence")
    theirs = verl_source.lifted("fsdp", "trainer/distillation/fsdp/losses.py", names, **known)
    logits, other = (x.float() for x in models(30))
    ids = other.topk(4).indices
    logits[0] = other[0].scatter_add(-1, ids[0], torch.ones(4))  # of more mass on the K than the teacher
    logits.requires_grad_()
    teacher = other.log_softmax(-1).gather(-1, ids)
    nested = [torch.nested.nested_tensor([x], layout=torch.jagged) for x in (teacher, ids)]
    config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=floor))
    expected = theirs.compute_forward_kl_topk(logits[None], *nested, config, "thd")["distillation_losses"][0]
    expected = expected.clamp_min(0.0).clamp(-1.5, 1.5)
    assert (expected == 0).any() and (expected == 1.5).any()
    logp = tokenrl.token_logprobs(logits, ids, outputs=["logp"]).logp
    found = tokenrl.topk_token_divergence(logp, teacher, rest="truncated", logp_floor=floor, limits=(0, 1.5))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    grads = [torch.autograd.grad(x.sum(), logits)[0] for x in (found, expected)]
    assert grads[1].any()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


LOGP = torch.randn(2, 3, 4).log_softmax(-1)
ERRORS = {
    "rest": ({"rest": "tails"}, "rest: got 'tails', accepted: tail, .* Did you mean 'tail'"),
    "kind": ({"kind": "forward"}, "kind: got 'forward', accepted: .* Did you mean 'forward_kl'"),
    "dtype": (
        {"logp_topk": LOGP.half()},
        r"logp_topk: got a torch.Tensor of torch.float16 \[2, 3, 4\], accepted: float32",
    ),
    "shape": ({"other_logp_topk": LOGP[1:]}, r"other_logp_topk: got \[1, 3, 4\] on cpu, accepted: those of logp_topk"),
    "mask": ({"topk_mask": torch.ones(2, 3).bool()}, r"topk_mask: got torch.bool \[2, 3\], accepted: bool \[2, 3, 4\]"),
    "rows": ({"row_mask": torch.ones(2, 3)}, r"row_mask: got torch.float32 \[2, 3\], accepted: bool \[2, 3\]"),
    "entropy": ({"entropy": LOGP[..., 0]}, "entropy: got a tensor, accepted: None where rest is 'tail'"),
    "outside": ({"rest": "zero_outside", "kind": "reverse_kl"}, r"entropy: got None, accepted: that of p, \[2, 3\]"),
    "other kind": ({"rest": "zero_outside", "kind": "jsd"}, "kind: got 'jsd', accepted: forward_kl, reverse_kl"),
    "floor": ({"tail_floor": 0}, "tail_floor: got 0, accepted: a number above 0"),
    "limits": ({"limits": (1, 0)}, r"limits: got \(1, 0\), accepted: two numbers, the lower first"),
    "one limit": ({"limits": 10.0}, "limits: got 10.0, accepted: two numbers, the lower first"),
    "needless": (
        {"rest": "zero_outside", "entropy": LOGP[..., 0]},
        "entropy: got a tensor, accepted: None for forward_kl",
    ),
    "logp_floor": ({"logp_floor": "-10"}, "logp_floor: got '-10', a str, accepted: a number"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    given, message = ERRORS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        tokenrl.topk_token_divergence(**{"logp_topk": LOGP, "other_logp_topk": LOGP} | given)


def test_errors_of_the_lists():
    for k in (0, 5, True, 2.0):
        with pytest.raises(ValueError, match=f"^k: got {k}, accepted: an integer from 1 to 4, the vocabulary"):
            tokenrl.topk_ids(LOGP, k)
    with pytest.raises(ValueError, match="^logits: got a torch.Tensor of torch.int64"):
        tokenrl.topk_ids(LOGP.long(), 1)
    with pytest.raises(ValueError, match="^row_mask: got"):
        tokenrl.linear_topk_ids(LOGP, LOGP[0], 1, row_mask=torch.ones(2, 2).bool())
    with pytest.raises(ValueError, match="^memory_budget: got 0"):
        tokenrl.topk_ids(LOGP, 1, memory_budget=0)
    with pytest.raises(ValueError, match="^mask: got shape"):
        tokenrl.topk_distillation_loss("kd", LOGP, LOGP, mask=torch.ones(2, 2).bool())
