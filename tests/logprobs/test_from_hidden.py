"""linear_token_logprobs on every backend: each output and gradient, every option, over one tile and over many."""

import pytest
import torch
from cases import device_of, kernel_backends
from linear_cases import VALUES, budget_of, check, make, make_exact, run, same_bits
from logit_cases import DIFFERENTIABLE, DTYPES

import tokenrl
from tokenrl.instruments.parity import close
from tokenrl.logprobs.from_logits import OUTPUTS
from tokenrl.ops.linear import token_logprobs

KERNELS = kernel_backends()
EVERY_KERNEL = pytest.mark.parametrize("backend", KERNELS)
CPU = pytest.mark.skipif("cpu" not in KERNELS, reason="the C++ backend is not built")
# The interpreter multiplies -inf by 0, and divides by the 0 logits of a tile that is left out, before it selects.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")


def zeros(found, rows):
    """Every output and the gradient of hidden are 0 in these rows."""
    return all(x[rows].count_nonzero() == 0 for name, x in found.items() if name not in ("weight", "bias"))


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,k", [((5,), None), ((2, 3), None), ((5,), 3), ((2, 3), 2)])
def test_every_value_and_gradient(shape, k, dtype, backend):
    check(*make(*shape, dtype=dtype, k=k), backend)


@EVERY_KERNEL
@pytest.mark.parametrize("name", VALUES)
def test_each_output_alone(name, backend):
    check(*make(3, vocab=65, bias=False), backend, outputs=(name,))


@EVERY_KERNEL
@pytest.mark.parametrize("outputs", [("rank", "lse", "logp"), ("max_prob", "entropy"), OUTPUTS[::-1]], ids="+".join)
def test_results_come_in_the_order_asked_for(outputs, backend):
    check(*make_exact(3, vocab=65), backend, outputs=outputs)


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [None, 3])
def test_the_order_where_the_gemm_is_exact(k, dtype, backend):
    """With many ties; over tiles of some rows, which the order asks to be whole."""
    case = make_exact(6, dtype=dtype, k=k)
    check(*case, backend, outputs=OUTPUTS)
    size = dtype.itemsize
    check(*case, backend, outputs=("rank", "is_top1"), memory_budget=2 * (301 * size + 8 * size + 256), pulled=())


OPTIONS = {
    "temperature": {"temperature": 0.6},
    "a temperature per row": {"temperature": torch.linspace(0.4, 2.0, 6)},
    "softcap": {"softcap": 4.0, "logit_scale": 1.7},
    "softcap and temperatures": {"softcap": 30.0, "temperature": torch.linspace(0.4, 2.0, 6)},
}


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_transforms(options, dtype, backend):
    check(*make(6, dtype=dtype), backend, **OPTIONS[options])


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_keep_mask(per_row, dtype, backend):
    """What is left out for all rows gets no gradient: neither its weights nor its bias."""
    hidden, weight, bias, ids = make(2, 3, dtype=dtype)
    keep = torch.rand((2, 3, 301) if per_row else (301,), generator=torch.Generator().manual_seed(1)) > 0.4
    keep[..., 280:] = False
    ids %= 280
    keep = keep.scatter(-1, ids[..., None] if per_row else ids.flatten(), True)
    found = check(hidden, weight, bias, ids, backend, keep_mask=keep, softcap=25.0)
    assert found["weight"][280:].count_nonzero() == 0 == found["bias"][280:].count_nonzero()


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,k", [((6,), None), ((2, 3), 2)])
def test_rows_that_are_left_out_may_hold_anything(shape, k, dtype, backend):
    """By row_mask, or because all their ids are ignored."""
    hidden, weight, bias, ids = make(*shape, dtype=dtype, k=k)
    ids.view(6, -1)[1] = 17
    row_mask = torch.tensor([True, True, False, True, False, True]).view(shape)
    left_out = ~row_mask
    left_out.view(6)[1] = True
    ids.view(6, -1)[[0, 3, 5]] += ids.view(6, -1)[[0, 3, 5]] == 17
    hidden[left_out] = torch.nan
    assert zeros(check(hidden, weight, bias, ids, backend, row_mask=row_mask, ignore_index=17), left_out)


@EVERY_KERNEL
@pytest.mark.parametrize("pulled", [("logp",), ("entropy",), DIFFERENTIABLE], ids="+".join)
def test_rows_without_upstream_gradient(pulled, backend):
    rows = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0])
    assert check(*make(5), backend, pulled=pulled, rows=rows)["hidden"][rows == 0].count_nonzero() == 0


def seen_tiles(monkeypatch):
    """The tiles that every later call chooses, in order."""
    seen, choose = [], token_logprobs.tiles_of
    monkeypatch.setattr(
        token_logprobs, "tiles_of", lambda *inputs, **more: seen.append(choose(*inputs, **more)) or seen[-1]
    )
    return seen


def tiled(rows=12, vocab=500):
    """Options by name for a case with ids [rows, 3]."""
    kept = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(2)) > 0.3
    kept[:, :50] = True
    return {
        "plain": {},
        "a dropped tail": {"keep_mask": torch.arange(vocab) < 250},
        "a mask per row": {"keep_mask": kept},
        "temperatures and softcap": {"temperature": torch.linspace(0.5, 2, rows), "softcap": 5.0},
        "rows left out": {"row_mask": torch.arange(rows) % 5 != 1},
        "ignored ids": {"ignore_index": 7},
        "minus infinity": {},
    }


# What is tiled is written once: a dtype is enough for the kernels that are interpreted.
PAIRS = [(backend, dtype) for backend in KERNELS for dtype in DTYPES if backend == "cpu" or dtype == torch.bfloat16]


@pytest.mark.parametrize("backend,dtype", PAIRS)
@pytest.mark.parametrize("options", tiled())
def test_many_tiles_are_one(options, backend, dtype, monkeypatch):
    """2 tiles side by side and several above each other, in the forward and in the backward.

    The GEMM is exact: what errs is the merge, or the sums of the gradients."""
    hidden, weight, bias, ids = make_exact(12, vocab=500, width=4, dtype=dtype, k=3)
    given = tiled()[options]
    if options in ("a dropped tail", "a mask per row"):
        ids %= 50
    if "row_mask" in given:
        hidden[~given["row_mask"]] = torch.nan
    if options == "ignored ids":
        ids[0], ids[3, 1], ids[5, :2] = 7, 7, 7
    if options == "minus infinity":
        bias[:256], ids = -torch.inf, 256 + ids % 244
    seen = seen_tiles(monkeypatch)
    check(hidden, weight, bias, ids, backend, memory_budget=budget_of(weight, 3), **given)
    assert [(x.columns, 1 <= x.rows < 9) for x in seen] == [(256, True)] * 2


@EVERY_KERNEL
def test_an_id_of_a_tile_that_the_mask_takes_out(backend):
    """Its log-prob is -inf, as in one tile; the gradients are those of the other tile, and finite."""
    hidden, weight, bias, ids = make_exact(12, vocab=500, width=4)
    ids[:6] %= 256
    ids[6:] = 256 + ids[6:] % 244
    keep = torch.arange(500) >= 256
    found = check(hidden, weight, bias, ids, backend, memory_budget=budget_of(weight, 3), keep_mask=keep)
    assert (found["logp"][:6] == -torch.inf).all() and found["logp"][6:].isfinite().all()
    assert all(found[name].isfinite().all() for name in ("hidden", "weight", "bias"))


@EVERY_KERNEL
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(offset, backend):
    """Integers, so that what is rounded is not the GEMM but what the kernels make of it."""
    hidden, weight, bias, ids = make_exact(4)
    check(hidden, weight, bias + offset, ids, backend, outputs=OUTPUTS)


@EVERY_KERNEL
def test_a_tied_embedding_gets_the_sum_of_both_gradients(backend):
    _, weight, _, ids = make(7, vocab=101)

    def gradient(dtype, name):
        table = weight.to(device_of(name), dtype).requires_grad_()
        tokens = ids.to(table.device)
        hidden = torch.nn.functional.embedding(tokens.flip(0), table).tanh()
        stats = tokenrl.linear_token_logprobs(hidden, table, tokens, backend=name)
        return torch.autograd.grad(stats.logp.sum() + 0.1 * stats.entropy.sum(), table)[0].cpu()

    close(
        gradient(torch.float32, backend), gradient(torch.float64, "reference"), gradient(torch.float32, "reference")
    )  # fmt: skip


@EVERY_KERNEL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_fp32_head_of_16_bit_tensors(dtype, backend):
    """As exact as fp32 on the same numbers; the gradients come in the dtypes of their tensors."""
    found = check(*make(5, dtype=dtype), backend, compute_dtype=torch.float32)
    assert all(found[name].dtype == dtype for name in ("hidden", "weight", "bias"))
    assert found["logp"].dtype == torch.float32


@EVERY_KERNEL
def test_tensors_of_several_dtypes(backend):
    hidden, weight, bias, ids = make(5, dtype=torch.bfloat16)
    found = check(hidden, weight.float(), bias.float(), ids, backend, compute_dtype=torch.float32)
    assert [found[name].dtype for name in ("hidden", "weight", "bias")] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]


@EVERY_KERNEL
def test_strided_tensors(backend):
    """A weight whose columns lie together, hidden states turned or without their last token."""
    hidden, weight, bias, ids = make(3, 4)
    turned = weight.t().contiguous().t()
    check(hidden[:, :-1], turned, bias, ids[:, :-1], backend)
    check(hidden.transpose(0, 1), turned, bias, ids.t(), backend)


@EVERY_KERNEL
@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,)])
def test_nothing_to_do(shape, backend):
    """No rows, or none that is used: zeros, and gradients of zero."""
    hidden, weight, bias, ids = make(*shape, dtype=torch.bfloat16)
    ids[:] = -100
    found = run(hidden * torch.nan, weight, bias, ids, backend, outputs=OUTPUTS)
    assert found["logp"].shape == shape and found["weight"].shape == weight.shape
    assert all(x.count_nonzero() == 0 for x in found.values())


@EVERY_KERNEL
def test_the_same_call_gives_the_same_bits(backend):
    case = make_exact(12, vocab=500, width=4)
    same_bits(*(run(*case, backend, memory_budget=budget_of(case[1], 3)) for _ in range(2)))


@EVERY_KERNEL
def test_autocast_changes_nothing(backend):
    """Not even the dtype of a GEMM: compute_dtype says what is computed in what."""
    case, device = make(5), device_of(backend).type
    plain = run(*case, backend)
    with torch.autocast(device, torch.bfloat16):
        cast = run(*case, backend)
    same_bits(plain, cast, torchs=plain)


@CPU
@pytest.mark.parametrize("dtype,budget", [(torch.bfloat16, None), (torch.bfloat16, 2 << 20), (torch.float32, 2 << 20)])
def test_twice_the_error_of_eager_at_most(dtype, budget):
    """At the shape of a small model's head, in one tile and in many."""
    check(*make(256, width=128, vocab=8000, dtype=dtype), "cpu", memory_budget=budget)
