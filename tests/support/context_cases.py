"""Cases of a batch whose tokens lie on ranks, as those of vocab_cases.py: the bits of one process."""

import functools

import pytest
import torch
from cases import batch, packed
from vocab_cases import said

import tokenrl
from tokenrl.distributed import ContextShard, wire


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
        found, gathered = tokenrl.policy_loss(row, context.gathered(own), **more)
        (grad,) = torch.autograd.grad(found, own)
        assert torch.equal(found, expected) and torch.equal(grad, context.take(truth)), name
        assert torch.equal(metrics.raw.nan_to_num(), gathered.raw.nan_to_num()), name


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
CASES |= {f"context, {case.__name__}": case for case in (exchanges, errors)}
