"""What tokenrl.profile makes of a GPU's events, here made up, and of its kernels' registers."""

from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from tokenrl.instruments import profiler
from tokenrl.instruments.machine_limits import Work
from tokenrl.instruments.profiling import accounts, lines, tables

pytestmark = pytest.mark.usefixtures("known_limits")


def event(name, begin, end, *children, kind=DeviceType.CPU, kernels=(), flops=0):
    """As torch.profiler has one; kernels: (name, microseconds) that it launched itself."""
    made = SimpleNamespace(
        name=name, device_type=kind, time_range=SimpleNamespace(start=begin, end=end), cpu_parent=None, is_async=False,
        cpu_children=list(children), is_user_annotation=name.startswith("tokenrl"), flops=flops,
        kernels=[SimpleNamespace(name=kernel, duration=taken) for kernel, taken in kernels], self_cpu_time_total=0.0,
    )  # fmt: skip
    made.self_device_time_total = sum(taken for _, taken in kernels)
    made.device_time_total = made.self_device_time_total + sum(child.device_time_total for child in children)
    for child in children:
        child.cpu_parent = made
    return made


def tree(root):
    return [root, *(one for child in root.cpu_children for one in tree(child))]


def test_what_a_gpu_did():
    """Times of the device, launches, waits, memory: of events as CUPTI gives them, the backward on its own thread."""
    forward = event(
        "tokenrl::linear_policy_loss forward [12, 8, 31] bf16 cuda", 1010, 1090,
        event(
            "tokenrl::linear_policy_loss", 1011, 1089,
            event("aten::mm", 1012, 1020, event("cudaLaunchKernel", 1013, 1014), kernels=[("gemm", 30.0)], flops=6000),
            event(accounts.COUNTING, 1020, 1024, event("aten::ne", 1021, 1022, kernels=[("ne", 1.0)])),
            event(
                "tokenrl::token_logprobs forward [12, 31] bf16 cuda", 1025, 1030,
                event("tokenrl::token_logprobs", 1026, 1029, kernels=[("logprobs_kernel", 20.0), ("merge", 5.0)]),
            ),
            event("aten::nonzero", 1031, 80, event("cudaStreamSynchronize", 1032, 79), kernels=[("Memcpy", 2.0)]),
        ),
    )  # fmt: skip
    step = event(accounts.STEP, 1000, 1200, forward)
    backward = event(
        "tokenrl::objective backward [12] fp32 cuda", 1100, 1110, event("aten::mul", 1101, 1109, kernels=[("mul", 4.0)])
    )
    ran = {"gemm": (1040, 1070), "logprobs_kernel": (1060, 1080), "mul": (1300, 1304), backward.name: (1300, 1304)}
    device = [event(name, *span, kind=DeviceType.CUDA) for name, span in ran.items()]

    def memory(at, nbytes, kind=DeviceType.CUDA):
        return SimpleNamespace(
            name=lambda: "[memory]",
            start_ns=lambda: 7_000_000 + at * 1000,
            nbytes=lambda: nbytes,
            device_type=lambda: kind,
        )

    results = SimpleNamespace(
        trace_start_ns=lambda: 7_000_000,
        events=lambda: [memory(1015, 100), memory(1027, 50), memory(1028, 900, DeviceType.CPU), memory(1050, -150)],
    )  # fmt: skip
    profiled = SimpleNamespace(
        events=lambda: [*tree(step), *tree(backward), *device], profiler=SimpleNamespace(kineto_results=results)
    )
    found = accounts.step_of(profiled, on_gpu=True)
    assert found.wall == pytest.approx(304e-6) and found.busy == pytest.approx(44e-6)
    assert (found.total.launches, found.total.syncs, found.total.peak) == (4, 1, 150)
    outer, after = found.ours
    assert outer.host == pytest.approx(76e-6) and outer.device == pytest.approx(57e-6)
    assert (outer.launches, outer.syncs, outer.peak, outer.flops, outer.products) == (3, 1, 150, 6000, 1)
    assert outer.products_device == pytest.approx(30e-6)
    (inner,) = found.inside(outer)
    assert inner.device == pytest.approx(25e-6) and inner.kernels["logprobs_kernel"] == [1, pytest.approx(20e-6)]
    assert after.device == pytest.approx(4e-6) and after.launches == 1
    assert [span.name for span in found.kernel_spans] == ["gemm", "logprobs_kernel", "mul"]
    made = lines.lines_of(found, {inner.path: Work(1000, 0, 372)}, "cuda")
    token = next(line for line in made if line.what == "token_logprobs forward")
    assert token.limit == "exp" and token.share == pytest.approx(372 / 1e9 / 25e-6)
    assert token.rate(token.bytes) == pytest.approx(1000 / 25e-6)


def test_registers_are_those_of_the_ops_that_ran(monkeypatch):
    numbers = {"threads": 256, "registers": 40, "shared_bytes": 64, "local_bytes": 0, "blocks_per_multiprocessor": 6}
    rows = [
        {"name": name} | numbers
        for name in ("token_logprobs bf16", "token_logprobs_backward bf16 many ids", "statistic float")
    ]  # fmt: skip
    native = SimpleNamespace(kernel_attributes=lambda: rows)
    monkeypatch.setattr(profiler.importlib, "import_module", lambda name: native)
    p = profiler.Profile("cuda")
    p.__dict__["lines"] = [lines.Line("token_logprobs backward", 0, 1, 1, 1.0, 1.0, (2, 3), "bf16", "cuda")]
    assert p.kernels == rows[:2]
    seen = tables.text([tables.of_kernels(p.kernels)])
    assert "many ids" in seen and "40" in seen and max(map(len, seen.splitlines())) <= tables.WIDTH
