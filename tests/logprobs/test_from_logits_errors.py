"""Wrong arguments of token_logprobs: the message names the argument, what was given and what is accepted."""

import math

import pytest
import torch
from cases import backends_to_test, device_of

import tokenrl

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
INT = torch.int64


def logprobs(*shape, ids=None, **options):
    ids = torch.zeros(shape[:-1], dtype=INT) if ids is None else ids
    return tokenrl.token_logprobs(torch.zeros(shape), ids, backend="reference", **options)


@pytest.mark.parametrize("name", ["softcap", "logit_scale"])
@pytest.mark.parametrize("bad", [0, -30.0, math.nan, math.inf, "high"])
def test_a_softcap_or_scale_that_is_not_positive_is_named(name, bad):
    with pytest.raises(ValueError, match=f"^{name}: got {bad!r}.*, accepted: a positive finite number"):
        logprobs(2, 4, **{name: bad})


@pytest.mark.parametrize(
    "bad,given",
    [
        (torch.ones(5, dtype=torch.bool), r"torch.bool \[5\]"),
        (torch.ones(2, 1, dtype=torch.bool), r"torch.bool \[2, 1\]"),
        (torch.ones(1, 2, 4, dtype=torch.bool), r"torch.bool \[1, 2, 4\]"),
        (torch.ones(4), r"torch.float32 \[4\]"),
        (torch.ones(2, 4, dtype=INT), r"torch.int64 \[2, 4\]"),
    ],
)
def test_a_wrong_keep_mask_is_named(bad, given):
    with pytest.raises(ValueError, match=rf"^keep_mask: got {given}, accepted: bool \[4\] or \[2, 4\]"):
        logprobs(2, 4, keep_mask=bad)


def test_a_keep_mask_on_another_device_is_named():
    with pytest.raises(ValueError, match="^keep_mask: got device meta, accepted: the device of logits, cpu"):
        logprobs(2, 4, keep_mask=torch.ones(4, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("shape,dtype", [((3,), torch.bool), ((2, 4), torch.bool), ((2,), INT), ((2,), torch.float32)])
def test_a_wrong_row_mask_is_named(shape, dtype):
    given = rf"{dtype} \[{', '.join(map(str, shape))}\]"
    with pytest.raises(ValueError, match=rf"^row_mask: got {given}, accepted: bool, one per row of logits, \[2\]"):
        logprobs(2, 4, row_mask=torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize(
    "shape,dtype",
    [((3,), torch.float32), ((2, 1), torch.float32), ((2,), INT), ((2,), torch.half)],
)
def test_a_wrong_tensor_of_temperatures_is_named(shape, dtype):
    given = rf"{dtype} \[{', '.join(map(str, shape))}\]"
    accepted = r"a positive number, or fp32 or fp64, one per row of logits, \[2\]"
    with pytest.raises(ValueError, match=rf"^temperature: got {given}, accepted: {accepted}"):
        logprobs(2, 4, temperature=torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_of_a_row_that_is_not_positive_is_named(bad):
    with pytest.raises(ValueError, match=f"^temperature: got {bad} in the tensor, accepted: positive finite numbers"):
        logprobs(2, 4, temperature=torch.tensor([1.0, bad]))


def test_a_temperature_that_wants_a_gradient_is_refused():
    with pytest.raises(ValueError, match="^temperature: got a tensor that requires grad"):
        logprobs(2, 4, temperature=torch.ones(2, requires_grad=True))


@pytest.mark.parametrize("shape", [(3,), (3, 5), (2, 0), (2, 5, 1), ()])
def test_several_ids_of_a_wrong_shape_are_named(shape):
    given = rf"shape \[{', '.join(map(str, shape))}\]"
    with pytest.raises(ValueError, match=rf"^ids: got {given}, accepted: one id per row .*\[2\], .*\[2, 'K'\]"):
        logprobs(2, 4, ids=torch.zeros(shape, dtype=INT))


@EVERY_BACKEND
def test_an_id_beside_good_ones_is_named(backend):
    if device_of(backend).type == "cuda":
        pytest.skip("on a GPU the check would be a host sync; there the result is nan")
    with pytest.raises(ValueError, match="^ids: got values from 0 to 4, accepted: 0 to 3, or -1 to ignore a row"):
        tokenrl.token_logprobs(torch.zeros(1, 4), torch.tensor([[0, 3, 4]]), ignore_index=-1, backend=backend)


@pytest.mark.parametrize("name,nearest", [("log_prob", "logp"), ("max_prop", "max_prob"), ("top1", "is_top1")])
def test_an_unknown_output_is_named(name, nearest):
    with pytest.raises(ValueError, match=f"^outputs: .*'{name}'.*(Did you mean '{nearest}'|{nearest})"):
        logprobs(2, 4, outputs=("logp", name))
