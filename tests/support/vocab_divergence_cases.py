"""Cases of divergences of two heads side by side on ranks, as those of vocab_cases.py."""

import functools
import math
from unittest import mock

import pytest
import torch
from cases import kernel_backends
from vocab_cases import TWICE, said, sizes_of

import tokenrl
from tokenrl import wire
from tokenrl.distributed import VocabShard, divergence_exchange
from tokenrl.distributed.vocab_ranks import VocabRanks
from tokenrl.ops.linear.ranks import OneRank

NEAR = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)
KINDS = [*tokenrl.DIVERGENCES]
ONE_READ = KINDS[:3]
DIM, OTHER_DIM = 4, 3


def own_columns(group, sizes):
    return slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))


def same_bits(group, x):
    every = wire.all_gather(x.detach().nan_to_num(), group)
    assert all(torch.equal(one, every[0]) for one in every), "other bits on another rank"


def heads(sizes, shape=(3, 4)):
    """Logits of both heads."""
    g = torch.Generator().manual_seed(len(sizes))
    return [2 * torch.randn(*shape, sum(sizes), generator=g, dtype=torch.float64) for _ in range(2)]


def weights_of(values):
    return torch.stack([x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape).cos() for x in values])


def compare(group, pair, sizes, kinds, backend, gradient=True, **how):
    at = own_columns(group, sizes)
    whole = [x.clone().requires_grad_() for x in pair]
    own = [x[..., at].clone().requires_grad_() for x in pair]
    expected = tokenrl.token_divergence(*whole, kinds, backend=backend, **how)
    how |= {name: x[..., at] for name, x in how.items() if name.endswith("keep_mask")}
    found = tokenrl.token_divergence(*own, kinds, backend=backend, vocab=VocabShard(group, sizes), **how)
    for kind, got, wanted in zip(kinds, found, expected, strict=True):
        NEAR(got, wanted, equal_nan=True, msg=lambda text, k=kind: f"{k}: {text}")
        same_bits(group, got)
    if gradient:
        truth = torch.autograd.grad(weights_of(expected).sum(), whole)
        grads = torch.autograd.grad(weights_of(found).sum(), own)
        most = max([1, *(x.abs().max().item() for x in expected if x.numel())])  # which a gradient is a difference of
        for got, wanted in zip(grads, truth, strict=True):
            NEAR(got, wanted[..., at], atol=1e-12 * most)


def every_kind(backend, group):
    sizes = sizes_of("unequal", group.size())
    pair = heads(sizes)
    compare(group, pair, sizes, KINDS, backend)
    compare(group, pair, sizes, KINDS[::-1], backend)
    g = torch.Generator().manual_seed(1)
    keep, other_keep = (torch.rand(pair[0].shape, generator=g) > 0.3 for _ in range(2))
    keep |= other_keep  # or forward KL is infinite
    temperatures = torch.linspace(0.5, 2, 12, dtype=torch.float64).view(3, 4)
    how = {"temperature": temperatures, "other_temperature": 0.7, "softcap": 9.0, "other_logit_scale": 0.8}
    row_mask = torch.arange(12).view(3, 4) != 5
    compare(group, pair, sizes, ["forward_kl", "jsd"], backend, keep_mask=keep, other_keep_mask=other_keep,
            row_mask=row_mask, **how)  # fmt: skip


def divergence_holes(backend, group):
    """Shards of no columns, and of -inf alone in either head, or both; logits of 1000 apart."""
    sizes = sizes_of("empty", group.size())
    compare(group, heads(sizes), sizes, KINDS, backend)
    sizes = sizes_of("equal", group.size())
    first, last = slice(0, 8), slice(sum(sizes) - 8, None)
    some = [kind for kind in KINDS if kind != "bhattacharyya"]  # whose slope is infinite where one is 0
    for dead, kinds, gradient in (((0,), ["reverse_kl", "jsd", "total_variation"], True), ((0, 1), some, True),
                                  ((0,), ONE_READ, False), ((1,), ONE_READ, False)):  # fmt: skip
        pair = heads(sizes)
        for which in dead:
            pair[which][..., first] = -math.inf
        compare(group, pair, sizes, kinds, backend, gradient)
    pair = [x * 300 for x in heads(sizes)]
    pair[1][..., last] -= 900
    compare(group, pair, sizes, ["forward_kl", "total_variation"], backend)
    compare(group, [x[:0] for x in heads(sizes)], sizes, ["forward_kl", "jsd"], backend)


def divergence_collectives(group):
    """One exchange of a kind of one read, 5 numbers a row; two of another; none in the backward."""
    sizes = sizes_of("unequal", group.size())
    own = [x[..., own_columns(group, sizes)].clone().requires_grad_() for x in heads(sizes)]
    for kind, sends in (("reverse_kl", [5]), ("jsd", [4, 3]), (["jsd", "alpha_beta"], [4, 3, 3])):
        with wire.counted() as sent:
            found = tokenrl.token_divergence(*own, kind, vocab=VocabShard(group, sizes), backend="cpu", check=False)
            (found if isinstance(kind, str) else sum(found)).sum().backward()
        assert sent == [("all_gather", 12 * 8 * numbers) for numbers in sends], sent


def divergence_errors(group):
    sizes, last, where = sizes_of("equal", group.size()), group.rank() == group.size() - 1, f"rank {group.size() - 1}"
    own, other = (x[..., own_columns(group, sizes)].clone() for x in heads(sizes))
    shard = VocabShard(group, sizes)

    def call(kind="jsd", x=own, **how):
        return tokenrl.token_divergence(x, other, kind, vocab=shard, **({"backend": "cpu"} | how))

    said(lambda: call(tokenrl.divergence("jsd", beta=0.5 - 0.1 * last)), "token_divergence: ", "kinds:", f"on {where}")
    said(lambda: call(other_softcap=9.0 if last else None), "transforms:", f"on {where}")
    said(lambda: call(row_mask=torch.full((3, 4), not last)), "row_mask (contents): differ")
    said(lambda: call(x=own[..., 1:] if last else own), f"{where}: ValueError: logits: got shape")
    for backend in ("reference", "cpu"):
        leaf = own.clone().requires_grad_()
        (grad,) = torch.autograd.grad(call(x=leaf, backend=backend).sum(), leaf, create_graph=True)
        said(lambda grad=grad, leaf=leaf: torch.autograd.grad(grad.square().sum(), leaf), TWICE, kind=RuntimeError)


def states(sizes, shape=(3, 4)):
    """(hidden, weight, bias) of both heads; a row of the first is of a token that is left out."""
    g = torch.Generator().manual_seed(len(sizes))

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    trained, other = ((random(*shape, d), random(sum(sizes), d), random(sum(sizes))) for d in (DIM, OTHER_DIM))
    trained[0][0, 1] = math.nan
    return trained, other, torch.arange(math.prod(shape)).view(shape) != 1


def of_heads(call, trained, other, wanted, **how):
    """(what it returns, the gradients of its sum under weights)."""
    leaves = [x.clone().requires_grad_(name in wanted) for name, x in zip(NAMES, trained, strict=True)]
    hidden, weight, bias = leaves
    found = call(hidden, weight, other[0], other[1], bias=bias, other_bias=other[2], **how)
    total = (weights_of([found]) if found.dim() else 2 * found).sum()
    return found.detach(), torch.autograd.grad(total, [x for x in leaves if x.requires_grad])


NAMES = ("hidden", "weight", "bias")


def compare_heads(group, call, given, sizes, wanted=NAMES, shard=None, reduces=True, sends=None, **how):
    trained, other, *_ = given
    at, part = own_columns(group, sizes), slice(None)
    expected, truth = of_heads(call, trained, other, wanted, **how)
    own, others = ([hidden, weight[at], bias[at]] for hidden, weight, bias in (trained, other))
    shard = VocabShard(group, sizes) if shard is None else shard
    if shard.sequence_parallel:
        size = trained[0].shape[1] // group.size()
        part = slice(group.rank() * size, (group.rank() + 1) * size)
        own[0], others[0] = own[0][:, part], others[0][:, part]
    how |= {} if reduces else {"reduce_hidden_grad": False}
    with wire.counted() as sent:
        found, grads = of_heads(call, own, others, wanted, vocab=shard, **how)
    assert sends is None or [kind for kind, _ in sent] == sends, sent
    NEAR(found, expected)
    same_bits(group, found.view(-1))
    for name, got, wanted_grad in zip(wanted, grads, truth, strict=True):
        if name == "hidden" and not reduces:
            got = wire.all_reduce(got.clone(), group)
        NEAR(got, wanted_grad[:, part] if name == "hidden" else wanted_grad[at])


def from_states(backend, group):
    """By token, and as a loss; in chunks, frozen, of shares that the caller sums, of a rank without rows."""
    sizes = sizes_of("unequal", group.size())
    given = trained, other, row_mask = states(sizes)
    chunk = 4 * (2 * max(sizes) * 8 * 33 // 32 + 8 * DIM + 128) + 8 * max(sizes)
    for kind in ("forward_kl", "jsd"):

        def by_token(*heads, kind=kind, **how):
            return tokenrl.linear_token_divergence(*heads, kind, row_mask=row_mask, backend=backend, **how)

        compare_heads(group, by_token, given, sizes, temperature=0.7, other_softcap=9.0)
        compare_heads(group, by_token, given, sizes, ("weight",), memory_budget=chunk)

    def loss(objective, *heads, **how):
        return tokenrl.linear_distillation_loss(objective, *heads, mask=row_mask, backend=backend, **how)[0]

    chunks = ["all_gather", "all_reduce"]
    chunks = None if backend == "reference" else ["all_gather", *chunks, *chunks, *chunks]
    compare_heads(
        group, functools.partial(loss, "kd"), given, sizes, temperature=2.0, memory_budget=2 * chunk, sends=chunks
    )
    compare_heads(group, functools.partial(loss, "gkd"), given, sizes, reduces=False)
    compare_heads(group, functools.partial(loss, "reverse_kd"), given, sizes, ("hidden",))
    empty = sizes_of("empty", group.size())
    compare_heads(group, functools.partial(loss, "kd"), states(empty), empty)


def shared_and_in_parts(group):
    """One head of both, one GEMM; hidden of the own tokens."""
    sizes = sizes_of("unequal", group.size())
    trained, other, row_mask = states(sizes, (3, 12))
    shard = VocabShard(group, sizes, sequence_parallel=True)

    def loss(*heads, **how):
        return tokenrl.linear_distillation_loss("gkd", *heads, mask=row_mask, **how)[0]

    compare_heads(group, functools.partial(loss, backend="cpu"), (trained, other), sizes, shard=shard)
    compare_heads(group, functools.partial(loss, backend="reference"), (trained, other), sizes, shard=shard)

    def of_one_head(hidden, weight, other_hidden, *_, bias, other_bias, **how):
        return loss(hidden, weight, other_hidden, weight.detach(), bias=bias, other_bias=bias.detach(), **how)

    same = (trained[0].nan_to_num().flip(0), trained[1], trained[2])
    compare_heads(group, functools.partial(of_one_head, backend="cpu"), (trained, same), sizes)


def of_lists(group):
    """Over K ids: the loss of log-probs that lie on no rank."""
    sizes = sizes_of("unequal", group.size())
    (hidden, weight, bias), _, mask = states(sizes)
    g, at = torch.Generator().manual_seed(1), own_columns(group, sizes)
    ids = torch.rand(3, 4, sum(sizes), generator=g).argsort(-1)[..., :3]
    teacher = torch.randn(3, 4, 3, generator=g, dtype=torch.float64).log_softmax(-1) - 0.5
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    how = {"mask": mask, "rest": "tail"}
    expected, _ = tokenrl.linear_topk_distillation_loss("gkd", *leaves[:2], ids, teacher, bias=leaves[2], **how)
    own = [x.clone().requires_grad_() for x in (hidden, weight[at], bias[at])]
    shard = VocabShard(group, sizes)
    logp = tokenrl.linear_token_logprobs(*own[:2], ids, bias=own[2], outputs=["logp"], row_mask=mask, vocab=shard).logp
    found, _ = tokenrl.topk_distillation_loss("gkd", logp, teacher, **how)
    NEAR(found, expected)
    truth, grads = torch.autograd.grad(expected, leaves), torch.autograd.grad(found, own)
    NEAR(grads, (truth[0], truth[1][at], truth[2][at]))


def canary(group):
    """What a comparison must notice: what the own columns add, alone; statistics of these."""
    sizes = sizes_of("unequal", group.size())
    trained, other, row_mask = states(sizes)

    def loss(*heads, **how):
        return tokenrl.linear_distillation_loss("gkd", *heads, mask=row_mask, backend="cpu", **how)[0]

    faults = (
        (VocabRanks, "divergence", OneRank.divergence),
        (divergence_exchange, "whole_statistics", lambda parts: parts[group.rank()]),
    )
    for fault in faults:
        with mock.patch.object(*fault), pytest.raises(AssertionError, match="Tensor-likes|Scalars"):
            compare_heads(group, loss, (trained, other), sizes)


def head_errors(group):
    sizes, last, where = sizes_of("equal", group.size()), group.rank() == group.size() - 1, f"rank {group.size() - 1}"
    at = own_columns(group, sizes)
    (hidden, weight, _), (other, other_weight, _), mask = states(sizes)
    given, shard = [hidden, weight[at], other, other_weight[at]], VocabShard(group, sizes)

    def call(*heads, **how):
        how = {"mask": mask, "vocab": shard, "backend": "cpu"} | how
        return tokenrl.linear_distillation_loss("kd", *(heads or given), **how)

    said(
        lambda: call(*given[:3], other_weight[at][: 7 if last else 8]), f"{where}: ValueError: other_weight: got shape"
    )
    said(lambda: call(mask=mask & (not last)), "rows_read (contents): differ between ranks")
    said(lambda: call(*given[:2], *[x[..., : 3 - last] for x in given[2:]]), "width: [4, 3] on rank 0")
    per_row = torch.ones(3, 4, weight[at].shape[0], dtype=torch.bool)
    said(lambda: call(keep_mask=per_row if last else None), "keep_mask:", "per row")
    said(lambda: call(memory_budget=1), "memory_budget: got 1 bytes")
    said(lambda: call(memory_budget=4096 - last), "memory_budget: 4096 on rank 0")
    said(lambda: call(vocab="x"), "vocab: got 'x', a str, accepted: a tokenrl.distributed.VocabShard")


CASES = {f"divergence, {case.__name__}, {b}": functools.partial(case, b)
         for case, b in ((every_kind, "reference"), (divergence_holes, "reference"), (divergence_holes, "cpu"),
                         *((every_kind, b) for b in kernel_backends() if b != "triton"))}  # fmt: skip
CASES |= {f"divergence, from_states, {b}": functools.partial(from_states, b) for b in ("reference", "cpu")}
CASES |= {
    f"divergence, {case.__name__}": case
    for case in (divergence_collectives, divergence_errors, shared_and_in_parts, of_lists, canary, head_errors)
}
