"""Wrong arguments of linear_token_logprobs: the message names the argument, what was given and what is accepted."""

import re

import pytest
import torch
from cases import kernel_backends

import tokenrl

EVERY_KERNEL = pytest.mark.parametrize("backend", kernel_backends())
INT, BF16, META = torch.int64, torch.bfloat16, torch.device("meta")


def call(hidden=(2, 3), weight=(4, 3), ids=(2,), backend="reference", **options):
    """Tensors, or shapes of zeros."""
    tensors = (x if isinstance(x, torch.Tensor) else torch.zeros(x) for x in (hidden, weight))
    ids = ids if isinstance(ids, torch.Tensor) else torch.zeros(ids, dtype=INT)
    return tokenrl.linear_token_logprobs(*tensors, ids, backend=backend, **options)


def refused(name, given, accepted, **options):
    with pytest.raises(ValueError, match="^" + re.escape(f"{name}: got {given}, accepted: {accepted}")):
        call(**options)


@pytest.mark.parametrize("shape", [(3,), (), (1, 1, 2, 3), (2, 0)])
def test_hidden_of_a_wrong_shape_is_named(shape):
    refused("hidden", f"shape {list(shape)}", "[N, D] or [B, T, D] with D >= 1", hidden=shape)


@pytest.mark.parametrize("shape", [(3,), (4, 2), (3, 4), (0, 3), (1, 4, 3)])
def test_a_weight_of_a_wrong_shape_is_named(shape):
    refused("weight", f"shape {list(shape)}", "[V, 3] for this hidden, V >= 1", weight=shape)


@pytest.mark.parametrize("shape", [(3,), (1,), (4, 1), ()])
def test_a_bias_of_a_wrong_shape_is_named(shape):
    refused("bias", f"shape {list(shape)}", "[4]", bias=torch.zeros(shape))


@pytest.mark.parametrize("name,shape", [("hidden", (2, 3)), ("weight", (4, 3)), ("bias", (4,))])
@pytest.mark.parametrize("dtype", [INT, torch.bool, torch.complex64])
def test_a_dtype_of_no_gemm_is_named(name, shape, dtype):
    accepted = "torch.bfloat16, torch.float16, torch.float32, torch.float64"
    refused(name, f"dtype {dtype}", accepted, **{name: torch.zeros(shape, dtype=dtype)})


@pytest.mark.parametrize("name,shape", [("weight", (4, 3)), ("bias", (4,))])
def test_dtypes_that_differ_are_named(name, shape):
    """They may differ beside compute_dtype."""
    x = torch.zeros(shape, dtype=BF16)
    refused(name, "dtype torch.bfloat16", "that of hidden, torch.float32, or any beside compute_dtype", **{name: x})
    call(compute_dtype=torch.float32, **{name: x})


@pytest.mark.parametrize("name,shape", [("weight", (4, 3)), ("bias", (4,))])
def test_a_tensor_on_another_device_is_named(name, shape):
    refused(name, "device meta", "the device of hidden, cpu", **{name: torch.zeros(shape, device=META)})


def test_ids_on_another_device_are_named():
    refused("ids", "device meta", "the device of logits, cpu", ids=torch.zeros(2, dtype=INT, device=META))


@pytest.mark.parametrize("bad", [INT, torch.float8_e4m3fn, "float32"])
def test_a_wrong_compute_dtype_is_named(bad):
    accepted = "torch.bfloat16, torch.float16, torch.float32, torch.float64"
    refused("compute_dtype", bad, accepted, compute_dtype=bad)


@pytest.mark.parametrize("bad", [0, -1, True, False, 1e9, "1 GiB"])
def test_a_wrong_memory_budget_is_named(bad):
    given = bad if type(bad) is int else f"{bad!r}, a {type(bad).__name__}"
    accepted = "a positive number of bytes, as an integer (int(memory_budget))"
    refused("memory_budget", given, accepted, memory_budget=bad)


@EVERY_KERNEL
@pytest.mark.parametrize("outputs,columns", [(("logp",), 256), (("logp", "rank"), 5000)])
def test_a_memory_budget_that_holds_no_tile_is_named(outputs, columns, backend):
    accepted = f"more: a tile of one row and {columns} columns"
    refused(
        "memory_budget", "999 bytes", accepted, weight=(5000, 3), memory_budget=999, outputs=outputs, backend=backend
    )


@pytest.mark.parametrize(
    "bad,given",
    [
        (torch.zeros(4, 3, dtype=BF16), "torch.bfloat16 [4, 3] on cpu"),
        (torch.zeros(4, 3, dtype=torch.float64), "torch.float64 [4, 3] on cpu"),
        (torch.zeros(3, 4), "torch.float32 [3, 4] on cpu"),
        (torch.zeros(12), "torch.float32 [12] on cpu"),
        (torch.zeros(4, 3, device=META), "torch.float32 [4, 3] on meta"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_wrong_main_grad_is_named(dtype, bad, given):
    weight = torch.zeros(4, 3, dtype=dtype)
    accepted = "torch.float32 [4, 3] on cpu"
    refused("main_grad", given, accepted, weight=weight, compute_dtype=torch.float32, main_grad=bad)


def test_the_main_grad_of_an_fp64_weight_is_fp64():
    tensors = {"hidden": torch.zeros(2, 3).double(), "weight": torch.zeros(4, 3).double()}
    given, accepted = "torch.float32 [4, 3] on cpu", "torch.float64 [4, 3] on cpu"
    refused("main_grad", given, accepted, main_grad=torch.zeros(4, 3), **tensors)


def test_a_main_grad_that_is_not_contiguous_is_named():
    refused("main_grad", "strides (1, 4)", "a contiguous tensor", main_grad=torch.zeros(3, 4).t())


def test_the_reference_backend_takes_no_main_grad():
    accepted = "None: the reference backend leaves its backward to autograd"
    refused("main_grad", "a tensor", accepted, main_grad=torch.zeros(4, 3))


@EVERY_KERNEL
def test_a_traced_graph_takes_no_main_grad(backend):
    main_grad, ids = torch.zeros(4, 3), torch.zeros(2, dtype=INT)

    def step(hidden, weight):
        stats = tokenrl.linear_token_logprobs(hidden, weight, ids, main_grad=main_grad, backend=backend)
        return stats.logp.sum()

    with pytest.raises(Exception, match="main_grad: got a tensor while torch.compile traces, accepted: None"):
        torch.compile(step, backend="eager", fullgraph=True)(torch.zeros(2, 3), torch.zeros(4, 3))


@pytest.mark.parametrize("name,nearest", [("log_prob", "logp"), ("max_prop", "max_prob"), ("top1", "is_top1")])
def test_an_unknown_output_is_named_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"^outputs: got '{name}', accepted: logp, .* Did you mean '{nearest}'"):
        call(outputs=("logp", name))


@pytest.mark.parametrize("shape", [(3,), (3, 5), (2, 0), (2, 5, 1), ()])
def test_ids_of_a_wrong_shape_are_named(shape):
    accepted = "one id per row of logits, [2], or K of them, [2, 'K']"
    refused("ids", f"shape {list(shape)}", accepted, ids=shape)


def test_ids_that_are_no_integers_are_named():
    refused("ids", "dtype torch.float32", "int64 or int32", ids=torch.zeros(2))


@EVERY_KERNEL
def test_an_id_beyond_the_vocabulary_is_named(backend):
    if torch.cuda.is_available():
        pytest.skip("on a GPU the check would be a host sync; there the result is nan")
    accepted = "0 to 3, or -100 to ignore a row"
    refused("ids", "values from 0 to 4", accepted, ids=torch.tensor([0, 4]), backend=backend)


WRONG = {
    "softcap": (-1.0, "-1.0", "a positive finite number"),
    "logit_scale": (0, "0", "a positive finite number"),
    "temperature": (
        torch.ones(3),
        "torch.float32 [3]",
        "a positive number, or fp32 or fp64, one per row of logits, [2]",
    ),
    "keep_mask": (torch.ones(3, dtype=torch.bool), "torch.bool [3]", "bool [4] or [2, 4]"),
    "row_mask": (torch.ones(2, 4, dtype=torch.bool), "torch.bool [2, 4]", "bool, one per row of logits, [2]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_of_the_logits_is_named(name):
    bad, given, accepted = WRONG[name]
    refused(name, given, accepted, **{name: bad})


def test_a_backend_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="^backend: got 'tritn', accepted: .*Did you mean 'triton'"):
        call(backend="tritn")
