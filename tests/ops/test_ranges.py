"""Every op has a range with a stable name where somebody profiles, and none elsewhere."""

from contextlib import contextmanager

import pytest
import torch
from cases import device_of, kernel_backends
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import ProfilerActivity, profile

import tokenrl
from tokenrl.ops import divergence_ops, kernel_ops, linear_divergence_ops, linear_ops, ranges

KERNELS = kernel_backends()
MODULES = (kernel_ops, divergence_ops, linear_ops, linear_divergence_ops)
G = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 11, (2, 3), generator=G)
OLD, ADVANTAGES = torch.randn(2, 3, generator=G) - 2, torch.tensor([1.0, -1.0])


def steps(backend, device="cpu"):
    """Every op, forward and backward; the gradients."""
    g = torch.Generator().manual_seed(1)
    logits, hidden, weight, logp = (
        torch.randn(*shape, generator=g).to(device).requires_grad_()
        for shape in ((2, 3, 11), (2, 3, 4), (11, 4), (2, 3))
    )
    ids, old, advantages = IDS.to(device), OLD.to(device), ADVANTAGES.to(device)
    on = {"backend": backend}
    losses = [
        tokenrl.policy_loss("ctpo", tokenrl.token_logprobs(logits, ids, **on).logp, old, advantages, **on)[0],
        tokenrl.linear_policy_loss("grpo", hidden, weight, ids, old, advantages, **on)[0],
        tokenrl.linear_token_logprobs(hidden, weight, ids, **on).logp.sum(),
        tokenrl.prefix_ratio(logp, old, flow="through", **on).sum(),
        tokenrl.position_adaptive_clip(logp - old, eps_low=0.1, eps_high=0.2, power=0.5, **on).sum(),
        tokenrl.token_divergence(logits, logits.detach() + 1, **on).sum(),
        tokenrl.linear_token_divergence(hidden, weight, hidden.detach(), 2 * weight.detach(), **on).sum(),
    ]
    return torch.autograd.grad(losses, (logits, hidden, weight, logp))


def names(call):
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    return {event.name for event in profiled.events() if event.is_user_annotation}


@pytest.mark.parametrize("backend", KERNELS)
def test_every_op_has_its_ranges(backend):
    found = names(lambda: steps(backend, device_of(backend)))
    expected = {
        f"tokenrl::{op} {way} {shape} fp32 {backend}"
        for op, shape in (
            ("token_logprobs", [6, 11]), ("objective", [6]), ("linear_policy_loss", [6, 4, 11]), ("statistic", [6]),
            ("linear_token_logprobs", [6, 4, 11]), ("position_adaptive_clip", [6]), ("divergence", [6, 11]),
            ("linear_divergence", [6, 4, 11]),
        )
        for way in ("forward", "backward")
    }  # fmt: skip
    assert found >= expected | {f"tokenrl::aggregation_weights forward [6] fp64 {backend}"}
    ops = {op.partition("_backward")[0] for module in MODULES for op in module.SCHEMAS}
    assert {name.split()[0].removeprefix("tokenrl::") for name in found} == ops


def test_the_reference_has_forward_ranges():
    found = names(lambda: steps("reference"))
    assert "tokenrl::objective forward [6] fp32 reference" in found
    assert all(name.endswith("reference") and " forward " in name for name in found)


def test_a_dtype_of_the_head_is_that_of_its_products():
    hidden, weight = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(11, 4, dtype=torch.bfloat16)
    found = names(lambda: tokenrl.linear_token_logprobs(hidden, weight, IDS[0], compute_dtype=torch.float32))
    assert "tokenrl::linear_token_logprobs forward [3, 4, 11] fp32 cpu" in found
    found = names(lambda: tokenrl.token_logprobs(hidden, IDS[0].clamp(max=3)))
    assert "tokenrl::token_logprobs forward [3, 4] bf16 cpu" in found


def test_nobody_profiling_nothing_is_named(monkeypatch):
    def refuse(*args):
        raise AssertionError("a range was entered")

    monkeypatch.setattr(torch.autograd.profiler, "record_function", refuse)
    monkeypatch.setattr(ranges, "_marked", refuse)
    assert all(grad.any() for grad in steps("cpu"))


def test_ranges_change_no_gradient():
    plain, profiled = steps("cpu"), []
    names(lambda: profiled.extend(steps("cpu")))
    for one, other in zip(plain, profiled, strict=True):
        assert one.any() and torch.equal(one, other)


def loss_of(logits):
    logp = tokenrl.token_logprobs(logits, IDS).logp
    return tokenrl.policy_loss("ctpo", logp, OLD, ADVANTAGES)[0]


def test_a_trace_made_while_somebody_profiles_is_the_same_and_serves_both():
    logits, graphs = torch.randn(2, 3, 11, generator=G).requires_grad_(), []

    def backend(graph, inputs):
        def kept(graph, inputs):
            graphs.append(str(graph.graph))
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=kept, bw_compiler=kept)(graph, inputs)

    compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
    found = []
    names(lambda: found.extend(torch.autograd.grad(compiled(logits), logits)))
    found += torch.autograd.grad(compiled(logits), logits)
    expected = torch.autograd.grad(loss_of(logits), logits)[0]
    assert expected.any()
    for grad in found:
        torch.testing.assert_close(grad, expected)
    assert len(graphs) == 2 and all("tokenrl" in graph and "record_function" not in graph for graph in graphs)


def test_under_torch_func_too():
    x, found = torch.randn(2, 3, 11, generator=G), []
    ran = names(lambda: found.append(torch.func.grad(loss_of)(x)))
    torch.testing.assert_close(found[0], torch.func.grad(loss_of)(x), rtol=0, atol=0)
    assert {f"tokenrl::token_logprobs {way} [6, 11] fp32 cpu" for way in ("forward", "backward")} <= ran


def test_nvtx_under_nsight(monkeypatch):
    """Which profiles without torch's profiler."""
    open_, seen = [], []

    @contextmanager
    def nvtx(name):
        open_.append(name)
        seen.append(name)
        yield
        assert open_.pop() == name

    monkeypatch.setattr(ranges, "_NSIGHT", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx)
    assert ranges.wanted()
    steps("cpu")
    assert "tokenrl::linear_policy_loss backward [6, 4, 11] fp32 cpu" in seen and not open_
    assert len(seen) == len([name for name in seen if name.startswith("tokenrl::")])


def test_watchers_are_told_of_each_range():
    told = []
    ranges.watchers.append(told.append)
    try:
        found = names(lambda: steps("cpu"))
        steps("cpu")
    finally:
        ranges.watchers.remove(told.append)
    assert {one.name for one in told} == found
