"""Autocast is not followed: every function computes what its arguments say, in the bits it has without."""

import warnings

import pytest
import torch
from cases import backends_to_test, device_of, to_rounding
from front_calls import CALLS, HIDDEN, IDS, OLD, WEIGHT, R, tensors

import tokenrl


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function,given", CALLS, ids=lambda x: getattr(x, "__name__", ""))
def test_every_function_gives_the_same_bits(function, given, dtype):
    plain = tensors(function(**given))
    with torch.autocast("cpu", dtype):
        cast = tensors(function(**given))
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def loss(name, hidden, weight, bias, backend):
    ids, old_logp, advantages = (x.to(hidden.device) for x in (IDS, OLD, R))
    if name == "logprobs":
        return tokenrl.linear_token_logprobs(hidden, weight, ids, bias=bias, backend=backend).logp.sum()
    if name == "topk":
        lists = (ids[..., None], old_logp[..., None])
        return tokenrl.linear_topk_distillation_loss("kd", hidden, weight, *lists, bias=bias, backend=backend)[0]
    more = {"bias": bias, "entropy_coef": 0.1, "backend": backend}
    return tokenrl.linear_policy_loss(name, hidden, weight, ids, old_logp, advantages, **more)[0]


def heads(backend):
    return [x.to(device_of(backend)).clone().requires_grad_() for x in (HIDDEN, WEIGHT, torch.linspace(-1, 1, 11))]


@pytest.mark.parametrize("backend", backends_to_test())
@pytest.mark.parametrize("name", ["logprobs", "grpo", "gmpo", "topk"])
def test_a_backward_inside_gives_the_same_gradients(name, backend):
    device, found = device_of(backend).type, []
    for enabled in (False, True):
        given = heads(backend)
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            value = loss(name, *given, backend)
            found.append([value.detach(), *torch.autograd.grad(value, given)])
    for plain, cast in zip(*found, strict=True):
        to_rounding(cast, plain, name)


def test_the_reference_differentiates_twice():
    found = []
    for enabled in (False, True):
        given = heads("reference")
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads = torch.autograd.grad(loss("grpo", *given, "reference"), given, create_graph=True)
            found.append(torch.autograd.grad(sum(x.square().sum() for x in grads), given))
    for plain, cast in zip(*found, strict=True):
        assert plain.abs().max() > 0
        to_rounding(cast, plain)


@pytest.mark.parametrize("name", ["logprobs", "grpo", "gmpo"])
def test_a_head_says_that_it_does_not_follow(name):
    given = heads("reference")
    expected = r"^compute_dtype: got None under autocast to torch.bfloat16, .*; computes in torch.float32 \(name either"
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match=expected):
        loss(name, *given, None)
    for dtype, enabled in ((torch.float64, True), (torch.bfloat16, True), (torch.float32, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), warnings.catch_warnings():
            warnings.simplefilter("error")
            loss(name, *(x.detach().to(dtype) for x in given), None)
