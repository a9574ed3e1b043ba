"""Cases of a vocabulary side by side on ranks: each is run by all of them, and holds the result to the op on one."""

import functools
import itertools
import math

import torch
from cases import kernel_backends
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import tokenrl
from tokenrl import wire
from tokenrl.distributed import VocabShard
from tokenrl.distributed.agreement import Agreement
from tokenrl.logprobs.from_logits import OUTPUTS

GRADIENT = ("logp", "entropy", "lse", "log_sum_sq_probs")
TOLERANCE = {torch.float64: (1e-11, 1e-13), torch.float32: (2e-6, 2e-6), torch.bfloat16: (1e-2, 1e-3)}


def sizes_of(how: str, world: int) -> list[int]:
    if how == "unequal":
        return [5 + 3 * rank for rank in range(world)]
    if how == "one column":
        return [1, *[7] * (world - 1)]
    if how == "empty":
        return [9, *[0] * (world - 1)][::-1]
    return [8] * world


TWICE = "differentiated twice, accepted: once"


def weighed(stats, names):
    """A sum with a weight of its own for each number."""
    total = 0
    for k, name in enumerate(n for n in names if n in GRADIENT):
        x = getattr(stats, name).double()
        total = total + (x * torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).view_as(x).cos() * (k + 1)).sum()
    return total


def compare(group, logits, ids, sizes, names, backend, **options):
    """Values and gradient of the shards, and those of the whole vocabulary."""
    rank, start = group.rank(), sum(sizes[: group.rank()])
    whole = logits.clone().requires_grad_()
    expected = tokenrl.token_logprobs(whole, ids, outputs=names, backend=backend, **options)
    own = logits[..., start : start + sizes[rank]].clone().requires_grad_()
    how = (
        options | {"keep_mask": options["keep_mask"][..., start : start + sizes[rank]]}
        if "keep_mask" in options
        else options
    )
    found = tokenrl.token_logprobs(own, ids, outputs=names, backend=backend, vocab=VocabShard(group, sizes), **how)
    rtol, atol = TOLERANCE[logits.dtype]
    rtol, atol = (rtol, atol) if logits.dtype != torch.bfloat16 else TOLERANCE[torch.float32]
    for name in names:
        got, wanted = getattr(found, name), getattr(expected, name)
        assert got.dtype == wanted.dtype and got.shape == wanted.shape, name
        torch.testing.assert_close(
            got, wanted, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
        )
        every = wire.all_gather(got.detach().double(), group)
        assert all(torch.equal(x.nan_to_num(), every[0].nan_to_num()) for x in every), (
            f"{name}: other bits on another rank"
        )
    if {*names} & {*GRADIENT}:
        (truth,) = torch.autograd.grad(weighed(expected, names), whole)
        (grad,) = torch.autograd.grad(weighed(found, names), own)
        rtol, atol = TOLERANCE[logits.dtype]
        torch.testing.assert_close(grad, truth[..., start : start + sizes[rank]], rtol=rtol, atol=atol)
    return found


def batch(group, sizes, dtype=torch.float64, spread=2.0, shape=(3, 4), per_row=None):
    g = torch.Generator().manual_seed(len(sizes))
    logits = (spread * torch.randn(*shape, sum(sizes), generator=g, dtype=torch.float64)).to(dtype)
    ids = torch.randint(0, sum(sizes), (*shape, *([] if per_row is None else [per_row])), generator=g)
    ids[0, 0], ids[1, 2] = -100, sum(sizes) - 1
    return logits, ids


def everything(how, dtype, backend, group):
    sizes = sizes_of(how, group.size())
    logits, ids = batch(group, sizes, dtype)
    compare(group, logits, ids, sizes, OUTPUTS, backend)
    compare(group, logits, ids, sizes, ("logp",), backend, temperature=0.7)


def options(backend, group):
    sizes = sizes_of("unequal", group.size())
    logits, ids = batch(group, sizes, per_row=3)
    keep = torch.rand(*logits.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    row_mask = torch.arange(12).view(3, 4) != 5
    more = {"temperature": torch.linspace(0.5, 2, 12).view(3, 4).double(), "softcap": 9.0, "logit_scale": 0.8}
    compare(group, logits, ids, sizes, OUTPUTS, backend, keep_mask=keep, row_mask=row_mask, **more)
    compare(group, logits, ids, sizes, OUTPUTS, backend, keep_mask=keep[0, 0])
    flat = logits.reshape(12, -1), ids[..., 0].reshape(12)
    compare(group, *flat, sizes, ("entropy", "rank"), backend)


def holes(backend, group):
    """Ties across ranks, a shard of -inf alone, ids in it, logits of 1000 apart."""
    sizes = sizes_of("equal", group.size())
    logits, ids = batch(group, sizes)
    logits = logits.round()  # ties
    compare(group, logits, ids, sizes, OUTPUTS, backend)
    logits[..., :8] = -math.inf
    ids = torch.where(ids < 0, ids, ids.clamp(min=8))
    compare(group, logits, ids, sizes, OUTPUTS, backend)
    gone = ids.clone()
    gone[2, 3] = 2
    own = logits[..., 8 * group.rank() :][..., :8]
    found = tokenrl.token_logprobs(own, gone, vocab=VocabShard(group, sizes), backend=backend)
    assert found.logp[2, 3] == -math.inf and found.entropy.isfinite().all()
    logits[:, :, 8:] *= 500
    compare(group, logits, ids, sizes, ("logp", "lse", "max_prob"), backend)


def padding(backend, group):
    """What is beyond the sizes is neither read nor gets a gradient."""
    shard = VocabShard.megatron(150, group)
    assert sum(shard.sizes) == 150 and shard.total == 150
    logits, ids = batch(group, shard.sizes)
    whole = tokenrl.token_logprobs(logits, ids, backend=backend)
    own = torch.full((*logits.shape[:-1], 128), math.nan, dtype=torch.float64)
    own[..., : shard.size] = logits[..., shard.start : shard.start + shard.size]
    own.requires_grad_()
    found = tokenrl.token_logprobs(own, ids, vocab=shard, backend=backend)
    torch.testing.assert_close(found.logp, whole.logp, rtol=1e-11, atol=1e-12)
    (grad,) = torch.autograd.grad(found.logp.sum() + found.entropy.sum(), own)
    assert grad[..., shard.size :].eq(0).all() and grad.isfinite().all()


def no_rows(backend, group):
    """Contiguous or not: a batch may be empty."""
    sizes = sizes_of("unequal", group.size())
    for strided in (torch.zeros(0, sum(sizes)), torch.zeros(0, sum(sizes), 2)[..., 0]):
        compare(group, strided, torch.zeros(0, dtype=torch.int64), sizes, OUTPUTS, backend)


def collectives(group):
    """One exchange of 3 + K numbers a row, none in the backward; two more for an order; the comparison's 256 bytes."""
    sizes = sizes_of("unequal", group.size())
    logits, ids = batch(group, sizes, torch.float32)
    own = logits[..., : sizes[group.rank()]].clone().requires_grad_()
    how = {"vocab": VocabShard(group, sizes), "backend": "cpu"}
    with wire.counted() as sent:
        found = tokenrl.token_logprobs(own, ids, **how)
        torch.autograd.grad(found.logp.sum(), own)
    assert sent == [("all_gather", 256), ("all_gather", 12 * 4 * 4)], sent
    with wire.counted() as sent:
        tokenrl.token_logprobs(own, ids, check=False, outputs=["logp", "rank"], **how)
    assert sent == [("all_gather", 12 * 4 * 4), ("all_gather", 12 * 4), ("all_gather", 2 * 12 * 8)], sent


def double_backward(group):
    """Refused the second time, by the reference too: of a rank's gradient the others' statistics are no constants."""
    sizes = sizes_of("equal", group.size())
    logits, ids = batch(group, sizes, shape=(2, 3))
    start = sum(sizes[: group.rank()])
    own = logits[..., start : start + sizes[group.rank()]].clone().requires_grad_()
    shard = VocabShard(group, sizes)
    for backend in ("reference", *kernel_backends()):
        logp = tokenrl.token_logprobs(own, ids, vocab=shard, backend=backend).logp
        (grad,) = torch.autograd.grad(logp.sum(), own, create_graph=True)
        said(lambda grad=grad: torch.autograd.grad(grad.square().sum(), own), TWICE, kind=RuntimeError)


def one_graph(group):
    sizes = sizes_of("unequal", group.size())
    logits, ids = batch(group, sizes, torch.float32)
    start = sum(sizes[: group.rank()])
    own = logits[..., start : start + sizes[group.rank()]].clone().requires_grad_()
    shard = VocabShard(group, sizes)

    def loss(x):
        stats = tokenrl.token_logprobs(x, ids, vocab=shard, backend="cpu")
        return stats.logp.sum() + 0.1 * stats.entropy.sum()

    values = [f(own) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
    grads = [torch.autograd.grad(value, own)[0] for value in values]
    assert torch.equal(*values) and torch.equal(*grads)


def of_dtensors(group):
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    for vocab in (9, 2):  # 9 rows on 4 ranks are 3 3 3 0
        weight = distribute_tensor(torch.arange(3.0 * vocab).view(vocab, 3), mesh, [Shard(0)])
        shard = VocabShard.of_dtensor(weight)
        assert shard.size == weight.to_local().shape[0] and shard.total == vocab
        logits = distribute_tensor(torch.randn(4, vocab, generator=torch.Generator().manual_seed(0)), mesh, [Shard(1)])
        assert VocabShard.of_dtensor(logits, -1).sizes == shard.sizes
        found = tokenrl.token_logprobs(logits.to_local(), torch.tensor([0, 1, vocab - 1, 0]), vocab=shard).logp
        expected = logits.full_tensor().log_softmax(-1).gather(1, torch.tensor([[0], [1], [vocab - 1], [0]])).squeeze(1)
        torch.testing.assert_close(found, expected)
    assert VocabShard.of(5 + group.rank(), mesh["tp"]).sizes == [5 + rank for rank in range(group.size())]
    said(lambda: VocabShard.of_dtensor(distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])), "Shard(0)")
    said(lambda: tokenrl.token_logprobs(logits, torch.zeros(4, dtype=torch.int64), vocab=shard), "to_local")


def said(call, *words, kind=ValueError):
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), error
        return
    raise AssertionError(f"no error; expected one with {words}")


def disagreements(group):
    """On one rank alone, named on all; a right call after it works."""
    sizes, last = sizes_of("equal", group.size()), group.rank() == group.size() - 1
    logits, ids = batch(group, sizes)
    start = sum(sizes[: group.rank()])
    own = logits[..., start : start + sizes[group.rank()]]
    where, shard = f"rank {group.size() - 1}", VocabShard(group, sizes)

    def call(x=own, i=ids, vocab=shard, backend="cpu", **how):
        return tokenrl.token_logprobs(x, i, vocab=vocab, backend=backend, **how)

    other = ids.clone()
    other[2, 2] += 1 if other[2, 2] == 0 else -1
    moved = VocabShard(group, [sizes[0] + 1, *sizes[1:-1], sizes[-1] - 1])
    faults = {
        "rows": ({"x": own[:2], "i": ids[:2]}, ("rows: [3, 4] on rank 0", f"[2, 4] on {where}")),
        "dtype": ({"x": own.float()}, ("dtype: torch.float64 on rank 0", f"torch.float32 on {where}")),
        "ids": ({"i": other}, ("ids (contents): differ between ranks", f"and [{group.size() - 1}]")),
        "outputs": ({"outputs": ["logp"]}, ("outputs:", f"['logp'] on {where}")),
        "sizes": ({"vocab": moved}, ("sizes:",)),
        "temperature": ({"temperature": 0.5}, ("transform:", f"on {where}")),
        "a wrong argument": ({"i": ids.double()}, (f"{where}: ValueError: ids: got dtype torch.float64",)),
        "a backend that is none": ({"backend": "gpu"}, (f"{where}: ValueError: backend: got 'gpu'",)),
        "a shard too small": ({"x": own[..., 1:]}, (f"{where}: ValueError: logits: got shape",)),
    }
    for given, words in faults.values():
        said(lambda given=given: call(**(given if last else {})), "token_logprobs: ", *words)
        assert call().logp.shape == ids.shape


def other_errors(group):
    """Of any kind, on one rank alone: raised there as it is, and named on the others."""
    last = group.rank() == group.size() - 1

    def call():
        with Agreement("token_logprobs", group, torch.device("cpu")):
            if last:
                raise RuntimeError("out of memory")

    expected = {True: ("out of memory",), False: (f"rank {group.size() - 1}: RuntimeError: out of memory",)}
    said(call, *expected[last], kind=RuntimeError if last else ValueError)


CASES = {
    f"{how}, {str(dtype)[6:]}, {backend}": functools.partial(everything, how, dtype, backend)
    for how, dtype in itertools.product(("equal", "unequal", "one column", "empty"), TOLERANCE)
    for backend in ("reference", *kernel_backends())
    if backend in ("reference", "cpu") or (how == "unequal" and dtype == torch.float32)
}
for _case in (options, holes, padding, no_rows):
    CASES |= {f"{_case.__name__}, {b}": functools.partial(_case, b) for b in ("reference", *kernel_backends())}
CASES |= {
    case.__name__: case for case in (collectives, double_backward, one_graph, of_dtensors, disagreements, other_errors)
}
