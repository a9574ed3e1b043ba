"""Cases of linear_policy_loss with a head side by side on ranks, as those of vocab_cases.py."""

import functools
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from cases import kernel_backends
from linear_policy_cases import make, packed
from vocab_cases import TWICE, said, sizes_of

import tokenrl
from tokenrl import wire
from tokenrl.distributed import VocabShard
from tokenrl.distributed.vocab_ranks import VocabRanks
from tokenrl.distributed.vocabulary_parallel import NAMESPACE
from tokenrl.ops import derivatives
from tokenrl.ops.linear import directions, policy_loss, token_logprobs

DIM, WIDTH = 4, 12  # a width that 2, 3 and 4 divide
HEAD = ("weight", "bias", "keep_mask", "main_grad")
TERMS = {"kl_coef": 0.3, "entropy_coef": 0.1}
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
CLOSE = {torch.float64: 1e-12, torch.float32: 3e-6}


def given_of(group, sizes="unequal", dtype=torch.float64, **how):
    sizes = sizes_of(sizes, group.size())
    case = make(3, rows=5, width=WIDTH, dim=DIM, vocab=sum(sizes), poison=dtype == torch.float64, **how)
    del case["logp"]
    if dtype != torch.float64:
        case |= {
            name: x.to(dtype) for name, x in case.items() if isinstance(x, torch.Tensor) and x.dtype.is_floating_point
        }
    return case, sizes


def budget_for(tokens, sizes, size=8):
    """Of two chunks of so many tokens on the widest rank."""
    return 2 * tokens * (max(sizes) * size + DIM * size + 128)


def called(objective, case, wanted, **how):
    """(loss, metrics, the gradients of twice the loss by what is wanted)."""
    case = case | how
    leaves = {name: case[name].clone().requires_grad_() for name in wanted}
    case |= leaves
    arguments = [case.pop(name) for name in ("hidden", "weight", "ids", "old_logp", "advantages")]
    loss, metrics = tokenrl.linear_policy_loss(objective, *arguments, **case)
    grads = torch.autograd.grad(2 * loss, [*leaves.values()]) if leaves else []
    return loss.detach(), metrics, dict(zip(leaves, grads, strict=True))


def own_part(case, sizes, rank):
    at = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    parts = {name: case[name][at] for name in ("weight", "bias", "main_grad") if name in case}
    return case | parts | ({"keep_mask": case["keep_mask"][..., at]} if "keep_mask" in case else {}), at


def compare(group, objective, case, sizes, wanted=("hidden", "weight", "bias"), shard=None, sends=None, **how):
    """Loss, metrics, log-probs and gradients of the ranks, and those of one; of what kind the exchanges are."""
    on_one = {name: x for name, x in how.items() if name not in ("reduce_hidden_grad", "memory_budget")}
    torch.manual_seed(0)
    expected, metrics, truth = called(objective, case, wanted, **on_one)
    own, at = own_part(case, sizes, group.rank())
    shard = VocabShard(group, sizes) if shard is None else shard
    part = slice(None)
    if shard.sequence_parallel:
        size = WIDTH // group.size()
        part = slice(group.rank() * size, (group.rank() + 1) * size)
        own["hidden"] = own["hidden"][:, part]
    torch.manual_seed(0)
    with wire.counted() as sent:
        found, merged, grads = called(objective, own, wanted, vocab=shard, **how)
    kinds = [kind for kind, _ in sent]
    assert sends is None or kinds == sends, kinds
    tolerance = CLOSE[case["weight"].dtype]
    near = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    near(found, expected)
    near(merged.raw[:-2], metrics.raw[:-2])
    near((merged.logp, merged.token_entropy), (metrics.logp, metrics.token_entropy))
    for same in (found.view(1), merged.raw, merged.logp):
        every = wire.all_gather(same.nan_to_num(), group)
        assert all(torch.equal(x, every[0]) for x in every), "other bits on another rank"
    for name, got in grads.items():
        if name == "hidden" and not how.get("reduce_hidden_grad", True):
            got = wire.all_reduce(got.clone(), group)
        near(
            got, truth[name][:, part] if name == "hidden" else truth[name][at], msg=lambda text, n=name: f"{n}: {text}"
        )
    return merged


def few_tokens():
    """Chunks and whole rows of two tokens are enough, as a test's batch is small."""
    stack = ExitStack()
    for module in (policy_loss, directions, token_logprobs):
        stack.enter_context(mock.patch.object(module, "FEWEST_TOKENS", 2))
    return stack


ONE_CHUNK = ["all_gather"] * 2 + ["all_reduce"]


def one_chunk(backend, group):
    for sizes in ("unequal", "empty"):
        case, sizes = given_of(group, sizes)
        for objective, how in (("ctpo", {}), ("gspo", TERMS), ("gmpo", {}), ("cispo", {"on_policy": True})):
            compare(group, objective, case, sizes, backend=backend, **how)
    compare(group, "grpo", packed(case), sizes, backend=backend, temperature=0.7, softcap=9.0)


def chunks(group):
    """Of some tokens, whole sequences, or two passes: exchanges, and their order, are those of the chunks."""
    case, sizes = given_of(group)
    active = int((case["mask"] & (case["ids"] != -100)).sum())
    how = {"memory_budget": budget_for(6, sizes), "backend": "cpu", "without_advantage": "compute"}
    parts = -(-active // 6)
    with few_tokens():
        sends = ["all_gather"] * 3 + ["all_reduce", "all_gather"] * (parts - 2) + ["all_reduce"] * 2
        for objective, more in (("ctpo", {}), ("minpro", TERMS), ("gspo", {"on_policy": True})):
            assert compare(group, objective, case, sizes, sends=sends, **how, **more).passes == 1
        assert compare(group, "gspo", case, sizes, **how | {"memory_budget": budget_for(12, sizes)}).passes == 1
        assert compare(group, "gspo", case, sizes, sends=ONE_CHUNK, **how).passes == 2
        compare(group, "grpo", case, sizes, ("weight",), sends=["all_gather"] * (1 + parts), **how)
        frozen = ["all_gather"] * (1 + parts) + ["all_reduce"]
        assert compare(group, "gspo", case, sizes, ("hidden",), sends=frozen, **how).passes == 1
        compare(group, "gspo", case, sizes, (), sends=["all_gather"] * 2, **how)


def options(group):
    """A mask of the vocabulary, temperatures per row, fp32, shares that the caller sums."""
    sizes = sizes_of("unequal", group.size())
    keep = torch.rand(5, WIDTH, sum(sizes), generator=torch.Generator().manual_seed(1)) > 0.3
    how = {"temperature": torch.linspace(0.5, 2, 5 * WIDTH).view(5, WIDTH).double(), "keep_mask": keep}
    case, _ = given_of(group, **how)
    with few_tokens():
        compare(group, "ctpo", case, sizes, memory_budget=budget_for(9, sizes), backend="cpu")
    empty = sizes_of("empty", group.size())
    case, _ = given_of(group, "empty", keep_mask=torch.arange(sum(empty)) != 2)
    compare(group, "grpo", case, empty, backend="cpu", sends=["all_gather"] * 2, reduce_hidden_grad=False)
    case, _ = given_of(group, dtype=torch.float32)
    compare(group, "ctpo", case, sizes, backend="cpu")


def megatron(group):
    """Padded rows are not read; their gradient is none, and main_grad's rows of them stay; with a form, too."""
    shard = VocabShard.megatron(150, group)
    case, _ = given_of(group)
    weight, ids = torch.randn(150, DIM, generator=torch.Generator().manual_seed(5)).double(), case["ids"]
    case |= {"weight": weight, "bias": None}
    for objective in ("ctpo", "gmpo"):
        expected, _, truth = called(objective, case, ("hidden", "weight"), backend="cpu")
        own = torch.full((128, DIM), torch.nan, dtype=torch.float64)
        own[: shard.size] = weight[shard.start : shard.start + shard.size]
        own.requires_grad_().grad_added_to_main_grad = False
        main_grad = torch.ones_like(own, requires_grad=False)
        arguments = case["hidden"], own, ids, case["old_logp"], case["advantages"]
        rest = {name: case[name] for name in ("mask", "token_weight", "segment_ids", "group_ids")}
        how = {"vocab": shard, "main_grad": main_grad, "backend": "cpu"}
        loss, _ = tokenrl.linear_policy_loss(objective, *arguments, **how, **rest)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        (2 * loss).backward()
        if shard.size:
            assert own.grad_added_to_main_grad and own.grad.shape == own.shape
        added, whole = main_grad[: shard.size] - 1, truth["weight"][shard.start : shard.start + shard.size]
        torch.testing.assert_close(added, whole, rtol=1e-9, atol=1e-12)
        assert main_grad[shard.size :].eq(1).all()


def sequence_parallel(group):
    """hidden of the own tokens: gathered, its gradient scattered as it is summed; by linear_token_logprobs too."""
    case, sizes = given_of(group)
    for dtype in (None, torch.float64):
        shard = VocabShard(group, sizes, sequence_parallel=True, hidden_grad_dtype=dtype)
        sends = ["all_gather"] * 3 + ["reduce_scatter"]
        for backend in ("cpu", "reference"):
            compare(group, "ctpo", case, sizes, shard=shard, backend=backend, sends=sends)
        compare(group, "gmpo", case, sizes, shard=shard, backend="cpu")
    said(
        lambda: compare(group, "ctpo", case, sizes, shard=shard, reduce_hidden_grad=False),
        "reduce_hidden_grad: got False beside sequence_parallel",
    )


def wire_bytes(group):
    """16 bytes a token of fp32; hidden's sum in its own dtype."""
    case, sizes = given_of(group, dtype=torch.float32)
    own, _ = own_part(case, sizes, group.rank())
    tokens = int((case["mask"] & (case["ids"] != -100)).sum())
    for dtype, size in ((None, 4), (torch.bfloat16, 2)):
        shard = VocabShard(group, sizes, hidden_grad_dtype=dtype)
        with wire.counted() as sent:
            *_, grads = called("ctpo", own, ("hidden",), vocab=shard, backend="cpu", without_advantage="compute")
        assert sent == [("all_gather", 256), ("all_gather", 16 * tokens), ("all_reduce", size * tokens * DIM)], sent
        *_, truth = called("ctpo", case, ("hidden",), backend="cpu")
        close = 1e-5 if dtype is None else 0.02 * truth["hidden"].abs().max().item()
        torch.testing.assert_close(grads["hidden"], truth["hidden"], rtol=0, atol=close)


def canaries(group):
    """What compare must notice: statistics of the own rows alone, shares of a gradient that nobody sums."""
    case, sizes = given_of(group)
    faults = {"whole": lambda ranks, chunks, ids: chunks, "add_up": lambda ranks, grad, rows: None}
    for name, fault in faults.items():
        with mock.patch.object(VocabRanks, name, fault), pytest.raises(AssertionError, match="Tensor-likes|Scalars"):
            compare(group, "ctpo", case, sizes, backend="cpu")


def whole_call(group, dtype=torch.float64):
    """(a function of hidden and the own rows of the head, these leaves)."""
    case, sizes = given_of(group, dtype=dtype)
    own, _ = own_part(case, sizes, group.rank())
    leaves = [own["hidden"].nan_to_num().requires_grad_(), own["weight"].clone().requires_grad_()]
    shard, rest = VocabShard(group, sizes), {name: own[name] for name in ("mask", "bias")}

    def loss(hidden, weight, **how):
        how = {"backend": "cpu", "vocab": shard} | rest | how
        given = hidden, weight, own["ids"], own["old_logp"].nan_to_num(), own["advantages"]
        return tokenrl.linear_policy_loss("ctpo", *given, **how)[0]

    return loss, leaves


def policy_one_graph(group):
    loss, leaves = whole_call(group)
    values = [f(*leaves) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
    grads = [torch.autograd.grad(value, leaves) for value in values]
    torch.testing.assert_close(*values, rtol=0, atol=0)
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def ops_hold_their_contract(group):
    """Schema, fake and derivative of the ops, on the arguments that calls hand them."""
    loss, leaves = whole_call(group)
    sizes = sizes_of("unequal", group.size())
    shard, ids = VocabShard(group, sizes), torch.arange(5 * WIDTH).view(5, WIDTH) % sum(sizes)
    found = []
    recorded = mock.patch.object(derivatives, "_called", lambda *call: [found.append(call), run(*call)][1])
    run = derivatives._called
    with recorded:
        loss(*leaves)
        tokenrl.linear_token_logprobs(*leaves, ids, vocab=shard, backend="cpu")
        tokenrl.token_logprobs(leaves[0] @ leaves[1].t(), ids, vocab=shard, backend="cpu")
        pair = [leaves[0], leaves[1], leaves[0].detach() + 1, leaves[1].detach()]
        tokenrl.token_divergence(pair[0] @ pair[1].t(), pair[2] @ pair[3].t(), "jsd", vocab=shard, backend="cpu")
        tokenrl.linear_token_divergence(*pair, vocab=shard, backend="cpu")
    called = [(op, inputs) for namespace, op, inputs in found if namespace == NAMESPACE]
    assert len(called) == 5, called
    for op, inputs in called:
        torch.library.opcheck(getattr(torch.ops.tokenrl_distributed, op), inputs, test_utils=CHECKS)


def policy_errors(group):
    last, where = group.rank() == group.size() - 1, f"rank {group.size() - 1}"
    loss, leaves = whole_call(group)
    other = {"mask": torch.ones(5, WIDTH, dtype=torch.bool)} if last else {}
    said(lambda: loss(*leaves, **other), "mask (contents): differ between ranks")
    said(lambda: loss(*leaves, entropy_coef=0.1 * last), "terms:", f"on {where}")
    said(lambda: loss(leaves[0].detach() if last else leaves[0], leaves[1]), "gradients:", f"on {where}")
    said(lambda: loss(*leaves, memory_budget=1 if last else None), f"{where}: ValueError: memory_budget: got 1 bytes")
    said(lambda: loss(leaves[0], leaves[1][1:] if last else leaves[1]), f"{where}: ValueError: weight: got shape")
    said(lambda: loss(*leaves, vocab="x"), "vocab: got 'x', a str, accepted: a tokenrl.distributed.VocabShard")
    said(lambda: VocabShard(group, 4), "sizes: got 4, a int")
    (grad,) = torch.autograd.grad(loss(*leaves), leaves[:1], create_graph=True)
    said(lambda: torch.autograd.grad(grad.square().sum(), leaves[0]), TWICE, kind=RuntimeError)


CASES = {f"policy, one chunk, {b}": functools.partial(one_chunk, b) for b in ("reference", *kernel_backends())
         if b != "triton"}  # fmt: skip
CASES |= {
    f"policy, {case.__name__}": case for case in (chunks, canaries, options, megatron, sequence_parallel, wire_bytes)
}
CASES |= {case.__name__: case for case in (policy_one_graph, ops_hold_their_contract, policy_errors)}
