"""Cases of preference losses whose heads lie side by side on ranks, or whose tokens do, as those of vocab_cases.py."""

import functools
import math
from unittest import mock

import preference_cases
import torch
from vocab_cases import said, sizes_of
from vocab_divergence_cases import own_columns, same_bits

import tokenrl
from tokenrl import wire
from tokenrl.distributed import ContextShard, VocabShard, global_count
from tokenrl.ops.linear import joined

NEAR = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)
S, T, DIM, OTHER_DIM = 2 * preference_cases.P, preference_cases.T, 4, 3
ROWS = ("dpo", "simpo", "aot", "kto", "cpo", "tdpo2")
LEAVES = ("hidden", "weight", "bias", "token_weight")


def given(name, sizes):
    """Of linear_preference_loss, the reference from hidden states; a token that the mask leaves out is NaN."""
    g = torch.Generator().manual_seed(len(sizes))

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    row, case = tokenrl.PREFERENCES[name], preference_cases.batch(name)
    vocab = sum(sizes)
    case = {key: x for key, x in case.items() if key not in ("logp", "ref_logp", "divergence")}
    case |= {"hidden": random(S, T, DIM), "weight": random(vocab, DIM), "bias": random(vocab)}
    case |= {"ids": torch.randint(0, vocab, (S, T), generator=g), "token_weight": random(S, T).abs() + 0.5}
    case["mask"][0, 0] = False
    case["hidden"][0, 0] = math.nan
    if row.reference == "given":
        case |= {"ref_hidden": random(S, T, OTHER_DIM), "ref_weight": random(vocab, OTHER_DIM),
                 "ref_bias": random(vocab)}  # fmt: skip
    if row.coupling == "sorted_margins":
        case.pop("token_weight")
    return case


def called(name, case, wanted, **how):
    leaves = {key: case[key].clone().requires_grad_() for key in wanted if key in case}
    case = case | leaves | how
    first = [case.pop(key) for key in ("hidden", "weight", "ids")]
    loss, metrics = tokenrl.linear_preference_loss(name, *first, **case)
    grads = torch.autograd.grad(2 * loss, [*leaves.values()])
    return loss.detach(), metrics, dict(zip(leaves, grads, strict=True))


def compare(group, name, case, sizes, wanted=LEAVES, shard=None, sends=None, passes=1, **how):
    at, part = own_columns(group, sizes), slice(None)
    expected, metrics, truth = called(name, case, wanted, **{k: x for k, x in how.items() if k != "memory_budget"})
    own = case | {key: case[key][at] for key in ("weight", "bias", "ref_weight", "ref_bias") if key in case}
    shard = VocabShard(group, sizes) if shard is None else shard
    if shard.sequence_parallel:
        size = case["hidden"].shape[1] // group.size()
        part = slice(group.rank() * size, (group.rank() + 1) * size)
        own |= {key: case[key][:, part] for key in ("hidden", "ref_hidden") if key in case}
    with wire.counted() as sent:
        found, merged, grads = called(name, own, wanted, vocab=shard, **how)
    assert sends is None or [kind for kind, _ in sent] == sends, (name, sent)
    assert merged.passes == passes, (name, merged.passes)
    NEAR(found, expected)
    NEAR([*merged[:5]], [*metrics[:5]], equal_nan=True)
    same_bits(group, found.view(1))
    same_bits(group, merged.logp)
    for key, got in grads.items():
        cut = truth[key][at] if key in ("weight", "bias") else truth[key][:, part] if key == "hidden" else truth[key]
        NEAR(got, cut, msg=lambda text, k=key: f"{name}, {k}: {text}")


def heads_on_ranks(group):
    """In one pass; in chunks of pairs, and two passes; by the reference, and by two ops where the budget is small."""
    sizes = sizes_of("unequal", group.size())
    for name in ROWS:
        case = given(name, sizes)
        exchanges = ["all_gather"] * (1 + (2 if name == "tdpo2" else 3 if "ref_hidden" in case else 1))
        compare(group, name, case, sizes, backend="cpu", sends=[*exchanges, "all_reduce"])
    case = given("dpo", sizes)
    one = max(sizes) * 8 + DIM * 8 + 128
    with mock.patch.object(joined, "FEWEST_TOKENS", 2):
        compare(group, "dpo", case, sizes, backend="cpu", memory_budget=16 * one, temperature=0.7)
        compare(group, "tdpo2", given("tdpo2", sizes), sizes, backend="cpu", memory_budget=16 * one, passes=2)
    compare(group, "dpo", case, sizes, backend="cpu", memory_budget=12 * one, passes=2)
    for name in ("dpo", "tdpo2"):
        compare(group, name, given(name, sizes), sizes, backend="reference", passes=2)
    empty = sizes_of("empty", group.size())
    compare(group, "tdpo2", given("tdpo2", empty), empty, backend="cpu")


def sequence_parallel(group):
    sizes = sizes_of("unequal", group.size())
    shard = VocabShard(group, sizes, sequence_parallel=True)
    for name in ("simpo", "tdpo2"):
        case = given(name, sizes)
        for key, x in case.items():  # 12 tokens, which 2, 3 and 4 divide
            if isinstance(x, torch.Tensor) and x.shape[:2] == (S, T):
                more = torch.zeros_like(x[:, : 12 - T])
                case[key] = torch.cat([x, more], 1)
        compare(group, name, case, sizes, shard=shard, backend="cpu")


def tokens_on_ranks(group):
    """Log-probs, divergences and the reference's log-probs are gathered: any row, of any cut."""
    bounds = torch.arange(0, S * T + 1, T)
    context = ContextShard(group, bounds, "zigzag")
    for name in ("dpo", "aot", "tdpo2", "bco_unpaired"):
        case = preference_cases.batch(name)
        case.pop("reward_shift", None)
        case = {key: x.reshape(-1) if x.shape == (S, T) else x for key, x in case.items()} | {"cu_seqlens": bounds}
        names = [key for key in ("logp", "divergence") if key in case]
        whole = {key: case[key].clone().requires_grad_() for key in names}
        own = {key: context.take(case[key]).requires_grad_() for key in names}
        expected, rewards = tokenrl.preference_loss(name, **case | whole)
        found, gathered = tokenrl.preference_loss(name, **case | own, context=context)
        assert torch.equal(found, expected)
        NEAR([*gathered], [*rewards], equal_nan=True, rtol=0, atol=0)
        truth, grads = (torch.autograd.grad(x, [*of.values()]) for x, of in ((expected, whole), (found, own)))
        assert all(map(torch.equal, grads, map(context.take, truth))), name
    sizes = [group.size()] * 5
    for name, backend in (("dpo", "cpu"), ("tdpo2", "reference"), ("tdpo2", "cpu")):
        case = given(name, sizes)
        case = {k: x.flatten(0, 1) if x.shape[:2] == (S, T) else x for k, x in case.items()} | {"cu_seqlens": bounds}
        how = {"backend": backend, "temperature": torch.linspace(0.5, 2, S * T, dtype=torch.float64)}
        expected, metrics, truth = called(name, case, LEAVES, **how)
        own = case | {key: context.take(case[key]) for key in ("hidden", "ref_hidden")}
        found, gathered, grads = called(name, own, LEAVES, context=context, **how)
        NEAR(found, expected)
        NEAR(gathered.logp, metrics.logp)
        same_bits(group, found.view(1))
        NEAR(grads["hidden"], context.take(truth["hidden"]))
        NEAR(grads["token_weight"], truth["token_weight"])
        NEAR(wire.all_reduce(grads["weight"].clone(), group), truth["weight"])


def pairs_on_ranks(group):
    """Data-parallel: parts under the count of all pairs, and of all tokens of the nll term, add up."""
    case = preference_cases.batch("cpo")
    logp, mask = (case[key].unflatten(0, (2, -1)).transpose(0, 1) for key in ("logp", "mask"))  # [P, 2, T]
    whole = logp.transpose(0, 1).flatten(0, 1).clone().requires_grad_()
    expected, _ = tokenrl.preference_loss("cpo", whole, mask=case["mask"])
    (truth,) = torch.autograd.grad(expected, whole)
    mine = [p for p in range(len(logp)) if p % group.size() == group.rank()]
    some, masks = (x[mine].transpose(0, 1).flatten(0, 1) for x in (logp, mask))
    some.requires_grad_()
    pairs = global_count([len(mine), 0], group=group, averaged_over=group.size())
    tokens = global_count(masks[: len(mine)].sum(), group=group, averaged_over=group.size())
    loss, _ = tokenrl.preference_loss("cpo", some, mask=masks, normalizer=pairs, nll_normalizer=tokens)
    (grad,) = torch.autograd.grad(loss, some) if mine else (some.detach(),)
    NEAR(wire.all_reduce(loss.detach().clone(), group) / group.size(), expected.detach())
    NEAR(grad / group.size(), truth.unflatten(0, (2, -1))[:, mine].flatten(0, 1))


def preference_errors(group):
    sizes, last, where = sizes_of("equal", group.size()), group.rank() == group.size() - 1, f"rank {group.size() - 1}"
    case = given("simpo", sizes)
    at = own_columns(group, sizes)
    own = case | {key: case[key][at] for key in ("weight", "bias")}
    shard = VocabShard(group, sizes)

    def call(name="simpo", **how):
        return called(name, own, LEAVES, **{"vocab": shard, "backend": "cpu"} | how)

    said(lambda: call(tokenrl.preference("simpo", beta=2.0 + last)), "objective: ", "simpo", f"on {where}")
    said(lambda: call(tokenrl.preference("simpo", nll=0.5 * last)), "objective: ", "nll=0.5", f"on {where}")
    of_ref = {"ref_logp": torch.zeros(S, T).double()} if last else given("dpo", sizes) | {}
    of_ref = {key: x[at] if key in ("ref_weight", "ref_bias") else x for key, x in of_ref.items() if "ref" in key}
    said(lambda: call("dpo", **of_ref), "ref_width: 3 on rank 0", f"None on {where}")
    said(lambda: call(mask=case["mask"] & (not last)), "mask (contents): differ between ranks")
    said(lambda: call(ids=case["ids"][1:] if last else case["ids"]), f"{where}: ValueError: ids: got shape")
    context = ContextShard(group, torch.arange(0, S * T + 1, T))
    parallel = VocabShard(group, sizes, sequence_parallel=True)
    words = "vocab: got one of sequence_parallel hidden states beside context, accepted: a VocabShard without it"
    said(lambda: call(vocab=parallel, context=context), words)
    flat = [x.flatten(0, 1) for x in (own["hidden"], own["ids"])]
    policy = functools.partial(tokenrl.linear_policy_loss, "ctpo", flat[0], own["weight"], flat[1], None, torch.ones(S))
    how = {"cu_seqlens": torch.arange(0, S * T + 1, T), "vocab": parallel, "context": context}
    said(lambda: policy(**how), "linear_policy_loss: ", words)


CASES = {
    f"preference, {case.__name__}": case
    for case in (heads_on_ranks, sequence_parallel, tokens_on_ranks, pairs_on_ranks, preference_errors)
}
