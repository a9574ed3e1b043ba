"""Cases of a batch whose tokens lie on ranks, as those of vocab_cases.py: the bits of one process."""

import functools

import linear_policy_cases
import pytest
import torch
from cases import batch, packed
from torch.distributed.device_mesh import DeviceMesh
from vocab_cases import said
from vocab_policy_cases import called, own_part

import tokenrl
from tokenrl import wire
from tokenrl.distributed import ContextShard, VocabShard


def layouts(cu_seqlens, world):
    tokens = int(cu_seqlens[-1])
    last = [(3, tokens - 3), (0, 1)]
    odd = [[], *[[] for _ in range(world - 3)], last, [(1, 2)]][-world:] if world > 2 else [last, [(1, 2)]]
    return {"contiguous": "contiguous", "zigzag": "zigzag", "per sequence": "zigzag_per_sequence", "blocks": odd}


def every_objective(layout, group):
    case = packed(batch(5, rows=6, width=11))
    cu_seqlens, logp = case.pop("cu_seqlens"), case.pop("logp")
    context = ContextShard(group, cu_seqlens, layouts(cu_seqlens, group.size())[layout])
    groups = {"group_ids": torch.arange(len(cu_seqlens) - 1) // 2}
    for name, row in list(tokenrl.OBJECTIVES.items())[group.size() % 3 :: 3]:  # the worlds take turns
        left_out = ("segment_ids", "token_weight") if name == "real" else ()
        more = {k: x for k, x in case.items() if k not in left_out} | groups | {"cu_seqlens": cu_seqlens}
        more |= {} if row.gate.uses_advantages else {"advantages": None}
        more["normalizer"] = 7.0
        whole = logp.clone().requires_grad_()
        torch.manual_seed(0)
        expected, metrics = tokenrl.policy_loss(row, whole, **more)
        (truth,) = torch.autograd.grad(expected, whole)
        own = context.take(logp).requires_grad_()
        torch.manual_seed(0)
        found, gathered = tokenrl.policy_loss(row, own, context=context, **more)
        (grad,) = torch.autograd.grad(found, own)
        assert torch.equal(found, expected) and torch.equal(grad, context.take(truth)), name
        assert torch.equal(metrics.raw.nan_to_num(), gathered.raw.nan_to_num()), name


def with_entropy(group):
    """Both in one exchange, and a trace of it."""
    case = packed(batch(5, rows=6, width=11))
    cu_seqlens, logp = case.pop("cu_seqlens"), case.pop("logp").nan_to_num()
    context = ContextShard(group, cu_seqlens, "zigzag")
    entropy = logp.square()
    whole = [x.clone().requires_grad_() for x in (logp, entropy)]
    own = [context.take(x).requires_grad_() for x in (logp, entropy)]

    def loss(both, **how):
        logp, entropy = both
        how = how | case | {"cu_seqlens": cu_seqlens, "entropy_coef": 0.3}
        return tokenrl.policy_loss("gspo", logp, entropy=entropy, backend="cpu", **how)[0]

    expected = loss(whole)
    truth = torch.autograd.grad(expected, whole)
    with wire.counted() as sent:
        found = loss(own, context=context)
        grads = torch.autograd.grad(found, own)
    assert sent == [("all_gather", 256), ("all_gather", 16 * max(context.counts))], sent
    assert torch.equal(found, expected) and all(map(torch.equal, grads, map(context.take, truth)))
    if group.size() == 2:
        traced = torch.compile(lambda both: loss(both, context=context), fullgraph=True, backend="aot_eager")(own)
        assert torch.equal(traced, expected) and all(map(torch.equal, torch.autograd.grad(traced, own), grads))


def from_hidden(group):
    case = linear_policy_cases.packed(linear_policy_cases.make(2, rows=6, width=11))
    del case["logp"]
    context = ContextShard(group, case["cu_seqlens"], "zigzag_per_sequence")
    temperature = torch.linspace(0.5, 2, len(case["ids"])).double()
    for objective, backend, how in (
        ("ctpo", "cpu", {}),
        ("gspo", "reference", {"entropy_coef": 0.1}),
        ("gmpo", "cpu", {}),
    ):
        how = {"backend": backend, "temperature": temperature} | how
        check_linear(group, context, objective, case, **how)
    *_, truth = called("ctpo", case, ("weight",), backend="cpu")
    total = torch.ones_like(case["weight"])
    own = case | {"hidden": context.take(case["hidden"]), "weight": case["weight"].clone().requires_grad_()}
    first = [own.pop(name) for name in ("hidden", "weight", "ids", "old_logp", "advantages")]
    loss, _ = tokenrl.linear_policy_loss("ctpo", *first, context=context, main_grad=total, backend="cpu", **own)
    (2 * loss).backward()
    assert first[1].grad is None
    torch.testing.assert_close(wire.all_reduce(total - 1, group), truth["weight"], rtol=1e-12, atol=1e-12)
    hidden = context.take(case["hidden"])
    given = hidden[1:] if group.rank() else hidden, case["weight"], case["ids"], case["old_logp"], case["advantages"]
    call = functools.partial(tokenrl.linear_policy_loss, "ctpo", *given, cu_seqlens=case["cu_seqlens"])
    said(lambda: call(context=context), "linear_policy_loss: rank 1: ValueError: hidden: got shape")
    said(lambda: call(context="x"), "context: got 'x', a str, accepted: a tokenrl.distributed.ContextShard")


def on_a_mesh(group):
    """The head's rows on one dimension, the tokens on the other."""
    if group.size() < 4:
        return
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("cp", "tp"))
    case = linear_policy_cases.packed(linear_policy_cases.make(2, rows=6, width=11))
    del case["logp"]
    context, shard = ContextShard(mesh["cp"], case["cu_seqlens"], "zigzag"), VocabShard.even(50, mesh["tp"])
    for objective, backend in (("ctpo", "cpu"), ("gspo", "reference")):
        expected, metrics, truth = called(objective, case, ("hidden", "weight"), backend=backend)
        own, at = own_part(case, shard.sizes, shard.rank)
        own["hidden"] = context.take(own["hidden"])
        how = {"context": context, "vocab": shard, "backend": backend}
        found, merged, grads = called(objective, own, ("hidden", "weight"), **how)
        near = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
        near(found, expected)
        near(merged.raw[:-2], metrics.raw[:-2])
        near(grads["hidden"], context.take(truth["hidden"]))
        near(wire.all_reduce(grads["weight"].clone(), context.group), truth["weight"][at])


def check_linear(group, context, objective, case, **how):
    """Loss and metrics of one process; hidden's gradient its part, weight's a share of it."""
    wanted = ("hidden", "weight", "bias")
    expected, metrics, truth = called(objective, case, wanted, **how)
    own = case | {"hidden": context.take(case["hidden"])}
    found, gathered, grads = called(objective, own, wanted, context=context, **how)
    near = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    near(found, expected)
    near(gathered.raw[:-2], metrics.raw[:-2])
    near(gathered.logp, metrics.logp)
    assert all(torch.equal(x, found) for x in wire.all_gather(found, group)), "other bits on another rank"
    near(grads["hidden"], context.take(truth["hidden"]))
    for name in ("weight", "bias"):
        near(wire.all_reduce(grads[name].clone(), group), truth[name])


def exchanges(group):
    context = ContextShard(group, 10, "zigzag")
    own = context.take(torch.arange(20.0).view(10, 2)).requires_grad_()
    with wire.counted() as sent:
        whole = context.gathered(own)
        whole.square().sum().backward()
    assert torch.equal(whole, torch.arange(20.0).view(10, 2)) and torch.equal(own.grad, 2 * own)
    assert sent == [("all_gather", 256), ("all_gather", max(context.counts) * 2 * 4)], sent
    assert sum(context.counts) == 10
    (grad,) = torch.autograd.grad(context.gathered(own).sum(0).prod(), own, create_graph=True)  # of other ranks' tokens
    with pytest.raises(RuntimeError, match="gathered: differentiated twice"):
        grad.sum().backward()


def errors(group):
    last = group.rank() == group.size() - 1
    context = ContextShard(group, 12)
    own = torch.zeros(context.counts[group.rank()])
    said(lambda: context.gathered(own.double() if last else own), "gathered: ranks do not agree: dtype:")
    said(lambda: context.gathered(own[1:] if last else own), f"rank {group.size() - 1}: ValueError: x: got shape")
    said(lambda: ContextShard(group, 12 if last else 13).gathered(own), "gathered: ")
    said(lambda: ContextShard(group, 12, [[(0, 12)]] * group.size()), "layout: got a piece (0, 12) after token 11")
    said(lambda: ContextShard(group, 12, "zig"), "layout", "zigzag")
    said(lambda: ContextShard(group, torch.tensor([0, 5, 3])), "cu_seqlens")


CASES = {f"context, {layout}": functools.partial(every_objective, layout) for layout in
         ("contiguous", "zigzag", "per sequence", "blocks")}  # fmt: skip
CASES |= {f"context, {case.__name__}": case for case in (with_entropy, from_hidden, on_a_mesh, exchanges, errors)}
