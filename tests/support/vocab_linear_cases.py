"""Cases of a head side by side on ranks, as those of vocab_cases.py."""

import functools
import math

import torch
from cases import kernel_backends
from vocab_cases import GRADIENT, OUTPUTS, TOLERANCE, TWICE, said, sizes_of, weighed

import tokenrl
from tokenrl import wire
from tokenrl.distributed import VocabShard

NAMES = tuple(name for name in OUTPUTS if name not in ("is_top1", "rank"))


def head(group, sizes, dtype=torch.float64, per_row=None):
    g = torch.Generator().manual_seed(len(sizes))
    hidden, weight, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
        for shape in ((3, 4, 6), (sum(sizes), 6), (sum(sizes),))
    )
    ids = torch.randint(0, sum(sizes), (3, 4, *([] if per_row is None else [per_row])), generator=g)
    ids[0, 0] = -100
    hidden[0, 0] = math.nan
    return hidden, weight, bias, ids


def compare(group, given, sizes, backend, frozen=False, reduces=True, names=NAMES, **how):
    hidden, weight, bias, ids = given
    at = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
    whole = [x.clone().requires_grad_(not frozen or x is hidden) for x in (hidden, weight, bias)]
    own = [x.clone().requires_grad_(not frozen or x is hidden) for x in (hidden, weight[at], bias[at])]
    kept = {"keep_mask": how.pop("keep_mask")} if "keep_mask" in how else {}
    found = tokenrl.linear_token_logprobs(
        own[0], own[1], ids, bias=own[2], outputs=names, backend=backend, vocab=VocabShard(group, sizes),
        reduce_hidden_grad=reduces, **{name: x[..., at] for name, x in kept.items()}, **how,
    )  # fmt: skip
    how.pop("memory_budget", None)
    expected = tokenrl.linear_token_logprobs(
        whole[0], whole[1], ids, bias=whole[2], outputs=names, backend=backend, **kept, **how
    )
    rtol, atol = TOLERANCE[torch.float32 if hidden.dtype == torch.bfloat16 else hidden.dtype]
    for name in names:
        got, wanted = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
        every = wire.all_gather(got.detach().double(), group)
        assert all(torch.equal(x, every[0]) for x in every), f"{name}: other bits on another rank"
    leaves = [k for k, x in enumerate(own) if x.requires_grad]
    truth = torch.autograd.grad(weighed(expected, names), [whole[k] for k in leaves])
    grads = [*torch.autograd.grad(weighed(found, names), [own[k] for k in leaves])]
    if not reduces:
        grads[0] = wire.all_reduce(grads[0].clone(), group)
    rtol, atol = TOLERANCE[hidden.dtype]
    for k, got, wanted in zip(leaves, grads, truth, strict=True):
        torch.testing.assert_close(got, wanted if k == 0 else wanted[at], rtol=rtol, atol=atol * 100)


def everything(how, dtype, backend, group):
    sizes = sizes_of(how, group.size())
    compare(group, head(group, sizes, dtype), sizes, backend)


def ways(backend, group):
    """Frozen, of shares that the caller sums, in tiles, with several ids, a mask, temperatures."""
    sizes = sizes_of("unequal", group.size())
    given = head(group, sizes)
    compare(group, given, sizes, backend, frozen=True, names=("logp",))
    compare(group, given, sizes, backend, reduces=False, names=GRADIENT)
    compare(group, given, sizes, backend, memory_budget=4096, names=("logp", "entropy"))
    keep = torch.rand(3, 4, sum(sizes), generator=torch.Generator().manual_seed(1)) > 0.3
    more = {"temperature": torch.linspace(0.5, 2, 12).view(3, 4).double(), "softcap": 9.0, "logit_scale": 0.8}
    compare(group, head(group, sizes, per_row=3), sizes, backend, keep_mask=keep, **more)
    compare(group, given, sizes, backend, keep_mask=keep[0, 0], row_mask=torch.arange(12).view(3, 4) != 5)


def linear_collectives(group):
    """One exchange forward, whatever the tiles; hidden's sum in the backward."""
    sizes = sizes_of("unequal", group.size())
    hidden, weight, _, ids = head(group, sizes, torch.float32)
    own = weight[: sizes[group.rank()]].requires_grad_()
    for leaf, backward in ((hidden.requires_grad_(), [("all_reduce", 12 * 6 * 4)]), (hidden.detach(), [])):
        with wire.counted() as sent:
            logp = tokenrl.linear_token_logprobs(
                leaf, own, ids, vocab=VocabShard(group, sizes), backend="cpu", memory_budget=4096, outputs=["logp"]
            ).logp
            logp.nansum().backward()
        assert sent == [("all_gather", 256), ("all_gather", 12 * 4 * 4), *backward], sent


def linear_no_rows(backend, group):
    hidden, weight, bias, ids = head(group, sizes_of("unequal", group.size()))
    compare(group, (hidden[:0], weight, bias, ids[:0]), sizes_of("unequal", group.size()), backend)


def linear_double_backward(group):
    sizes = sizes_of("equal", group.size())
    hidden, weight, _, ids = head(group, sizes)
    leaf, at = hidden.nan_to_num().requires_grad_(), slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
    for backend in ("reference", "cpu"):
        how = {"vocab": VocabShard(group, sizes), "backend": backend}
        logp = tokenrl.linear_token_logprobs(leaf, weight[at], ids, **how).logp
        (grad,) = torch.autograd.grad(logp.sum(), leaf, create_graph=True)
        said(lambda grad=grad: torch.autograd.grad(grad.square().sum(), leaf), TWICE, kind=RuntimeError)


def linear_one_graph(group):
    sizes = sizes_of("unequal", group.size())
    hidden, weight, _, ids = head(group, sizes, torch.float32)
    at = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
    leaves, shard = (
        [hidden.nan_to_num().requires_grad_(), weight[at].clone().requires_grad_()],
        VocabShard(group, sizes),
    )

    def loss(x, w):
        return tokenrl.linear_token_logprobs(x, w, ids, vocab=shard, backend="cpu", outputs=["logp"]).logp.sum()

    values = [f(*leaves) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
    grads = [torch.autograd.grad(value, leaves) for value in values]
    torch.testing.assert_close(*values, rtol=0, atol=0)
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def linear_errors(group):
    sizes, last = sizes_of("equal", group.size()), group.rank() == group.size() - 1
    hidden, weight, _, ids = head(group, sizes)
    at = slice(sum(sizes[: group.rank()]), sum(sizes[: group.rank() + 1]))
    shard = VocabShard(group, sizes)

    def call(x=hidden, w=weight[at], **how):
        return tokenrl.linear_token_logprobs(x, w, ids, vocab=shard, backend="cpu", **how)

    said(lambda: call(outputs=["rank"]), "outputs: got 'rank' beside vocab")
    said(
        lambda: call(w=weight[at][: 7 if last else 8]), f"rank {group.size() - 1}: ValueError: weight: got shape [7, 6]"
    )
    said(lambda: call(x=hidden.clone().requires_grad_(last)), "hidden_gradient: False on rank 0")
    small = f"rank {group.size() - 1}: ValueError: memory_budget: got 1 bytes"
    said(lambda: call(memory_budget=1 if last else None), small)


CASES = {
    f"linear, {how}, {str(dtype)[6:]}, {backend}": functools.partial(everything, how, dtype, backend)
    for how in ("unequal", "empty")
    for dtype in TOLERANCE
    for backend in ("reference", *kernel_backends())
    if backend in ("reference", "cpu") or (how == "unequal" and dtype == torch.float32)
}
CASES |= {f"linear ways, {b}": functools.partial(ways, b) for b in ("reference", *kernel_backends()) if b != "triton"}
CASES |= {case.__name__: case for case in (linear_collectives, linear_double_backward, linear_one_graph, linear_errors)}
CASES |= {f"linear_no_rows, {b}": functools.partial(linear_no_rows, b) for b in ("reference", "cpu")}
