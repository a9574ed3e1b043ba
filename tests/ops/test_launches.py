"""How many kernels a call launches on a GPU, counted without one: its own, and torch's."""

import ctypes

import pytest
import sim
import torch
from cases import kernel_backends

import tokenrl
from tokenrl.instruments.profiling.accounts import FREE

COUNTED = [name for name in kernel_backends() if name in ("sim", "triton") and not torch.cuda.is_available()]

KERNEL = "a kernel of ours"


@pytest.fixture
def launches(monkeypatch):
    """launches(call, backend) -> (how many kernels of its own it launches, torch's operations, each without those that
    it is made of)."""
    monkeypatch.setattr("tokenrl.ops.kernel_ops.values_known", lambda x: False)  # as on a GPU
    if "triton" in COUNTED:
        from triton.runtime.interpreter import GridExecutor

        run = GridExecutor.__call__

        def marked(*args, **options):
            with torch.profiler.record_function(KERNEL):
                return run(*args, **options)

        monkeypatch.setattr(GridExecutor, "__call__", marked)

    def counted(call, backend):
        library = ctypes.CDLL(str(sim.build_sim()))
        library.tokenrl_launches.restype = ctypes.c_int64
        before = library.tokenrl_launches()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        names = [name for event in profile.events() if event.cpu_parent is None for name in launching(event)]
        own = names.count(KERNEL) if backend == "triton" else library.tokenrl_launches() - before
        return own, [name for name in names if name != KERNEL]

    return counted


def launching(event) -> list[str]:
    name = event.name.removeprefix("aten::")
    if event.name == KERNEL:
        return [KERNEL]
    if event.name == name:
        return [inner for child in event.cpu_children for inner in launching(child)]
    return [] if event.name in FREE else [name]


@pytest.mark.parametrize("backend", COUNTED)
@pytest.mark.parametrize(
    "options, own",
    [({}, 2), ({"aggregation": "token-sum"}, 2), ({"normalizer": 7.0}, 2), ({"aggregation": "group-mean"}, 3)],
    ids=str,
)
def test_policy_loss_and_its_backward(options, own, backend, launches):
    """The boundaries of the rows, the weights (twice over where groups matter), the objective, a multiplication."""
    logp = torch.randn(3, 5, requires_grad=True)
    old, advantages, upstream = logp.detach() + 0.1, torch.randn(3), torch.ones(())
    options = options | {"mask": torch.rand(3, 5) > 0.2, "group_ids": torch.tensor([0, 0, 1]), "backend": backend}

    def call():
        loss, _ = tokenrl.policy_loss("grpo", logp, old, advantages, **options)
        torch.autograd.grad(loss, logp, upstream)

    call()  # what is made once for all calls
    assert launches(call, backend) == (own, ["arange", "mul"])


@pytest.mark.parametrize("backend", COUNTED)
@pytest.mark.parametrize("kind, sweeps", [("forward_kl", 1), ("jsd", 2)])
@pytest.mark.parametrize("both", [False, True])
def test_a_divergence_and_its_backward(both, kind, sweeps, backend, launches):
    """The sweeps of the divergence, and a gradient for each head that wants one; ids and rows."""
    pair = [torch.randn(3, 5, 7).requires_grad_(trained) for trained in (True, both)]
    rows, upstream = torch.rand(3, 5) > 0.2, torch.randn(3, 5)

    def call():
        value = tokenrl.token_divergence(*pair, kind, row_mask=rows, backend=backend)
        torch.autograd.grad(value, pair[: 1 + both], upstream)

    assert launches(call, backend) == (sweeps + 1 + both, ["new_zeros", "bitwise_not", "masked_fill"])


@pytest.mark.parametrize("backend", COUNTED)
def test_a_zeroing_would_be_counted(backend, launches):
    assert launches(lambda: torch.zeros(3), backend) == (0, ["zeros"])
    assert launches(lambda: torch.empty(3), backend) == (0, [])
