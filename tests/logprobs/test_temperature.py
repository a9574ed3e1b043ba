"""The temperature of a row that is never read may be anything: it changes no bit and is no error. A temperature is not
burnt into a graph of torch.compile."""

import math

import pytest
import torch
from cases import backends_to_test, device_of, interpreted
from graphs import counted

import tokenrl

EVERY_BACKEND = pytest.mark.parametrize("backend", backends_to_test())
ANYTHING = pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -1.0])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def of_logits(temperature, ids, mask, backend):
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 7).to(mask.device).requires_grad_()
    stats = tokenrl.token_logprobs(logits, ids, temperature=temperature, row_mask=mask, backend=backend)
    return stats.logp, (logits,)


def from_hidden(temperature, ids, mask, backend):
    torch.manual_seed(1)
    hidden, weight = (torch.randn(shape).to(mask.device).requires_grad_() for shape in ((2, 3, 4), (7, 4)))
    stats = tokenrl.linear_token_logprobs(hidden, weight, ids, temperature=temperature, row_mask=mask, backend=backend)
    return stats.logp, (hidden, weight)


def policy_loss(objective):
    def of(temperature, ids, mask, backend):
        torch.manual_seed(1)
        hidden, weight = (torch.randn(shape).to(mask.device).requires_grad_() for shape in ((2, 3, 4), (7, 4)))
        old, advantages = torch.full((2, 3), -2.0, device=mask.device), torch.tensor([1.0, -1.0], device=mask.device)
        loss, _ = tokenrl.linear_policy_loss(
            objective, hidden, weight, ids, old, advantages, temperature=temperature, mask=mask, entropy_coef=0.1,
            backend=backend,
        )  # fmt: skip
        return loss, (hidden, weight)

    return of


CALLS = {
    "token_logprobs": of_logits, "linear_token_logprobs": from_hidden, "one pass": policy_loss("grpo"),
    "two passes": policy_loss("gmpo"),
}  # fmt: skip


@EVERY_BACKEND
@ANYTHING
@pytest.mark.parametrize("ignored", [False, True], ids=["masked", "ignored"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_temperature_of_a_row_that_is_not_read(call, ignored, bad, backend):
    mask = MASK.to(device_of(backend))
    ids = torch.where(mask | (not ignored), torch.arange(6, device=mask.device).view(2, 3), -100)
    results = []
    for there in (1.0, bad):
        temperature = torch.where(mask, 0.7, there)
        out, leaves = call(temperature, ids, mask | ignored, backend)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for plain, found in zip(*results, strict=True):
        assert found.isfinite().all() and torch.equal(found, plain)


@EVERY_BACKEND
@ANYTHING
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_temperature_of_a_row_that_is_read_is_checked(call, bad, backend):
    mask = MASK.to(device_of(backend))
    if mask.device.type != "cpu":
        pytest.skip("on a GPU the check would be a host sync")
    temperature = torch.full((2, 3), 0.7)
    temperature[1, 0] = bad
    with pytest.raises(ValueError, match=f"^temperature: got {bad} in the tensor, accepted: positive finite numbers"):
        call(temperature, torch.zeros(2, 3, dtype=torch.int64), mask, backend)


@pytest.mark.parametrize("backend", [b for b in backends_to_test() if not interpreted(b) and b != "sim"])  # one graph
@pytest.mark.parametrize("call", [of_logits, from_hidden], ids=["token_logprobs", "linear_token_logprobs"])
def test_a_temperature_is_not_burnt_into_a_graph(call, backend):
    mask = MASK.to(device_of(backend))
    ids = torch.zeros(2, 3, dtype=torch.int64, device=mask.device)
    _, leaves = call(1.0, ids, mask, backend)

    def logp(temperature, *leaves):
        if call is of_logits:
            return tokenrl.token_logprobs(*leaves, ids, temperature=temperature, backend=backend).logp
        return tokenrl.linear_token_logprobs(*leaves, ids, temperature=temperature, backend=backend).logp

    compiled, graphs = counted(logp)
    for temperature in (0.5, 0.7, 1.0, 1.2, 1.3):
        plain, traced = logp(temperature, *leaves), compiled(temperature, *leaves)
        torch.testing.assert_close(traced, plain, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(out.sum(), leaves) for out in (traced, plain)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2
