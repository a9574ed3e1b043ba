"""The choice of a backend, its reasons, the supported versions, and metrics that are read once."""

import os
import subprocess
import sys

import pytest
import torch
from cases import CPU

import tokenrl
from tokenrl import _versions
from tokenrl.ops import backends


def loss(**more):
    return tokenrl.policy_loss("ppo", torch.zeros(1, 2), None, torch.ones(1), **more)


def test_a_forced_backend_that_cannot_run_lists_every_reason(monkeypatch):
    if backends.BACKENDS["cuda"].why_not(CPU) is None:
        raise AssertionError("the cuda backend claims cpu tensors")
    for how in ("argument", "environment"):
        with pytest.raises(RuntimeError) as error:
            if how == "argument":
                loss(backend="cuda")
            else:
                monkeypatch.setenv("TOKENRL_BACKEND", "cuda")
                loss()
        for name in backends.BACKENDS:
            assert f"{name}: " in str(error.value)


def test_when_none_can_run_the_call_says_why(monkeypatch):
    monkeypatch.delenv("TOKENRL_BACKEND", raising=False)
    never = {
        name: backends.Backend(name, b.namespace, lambda device, name=name: f"no {name} today")
        for name, b in backends.BACKENDS.items()
    }
    monkeypatch.setattr(backends, "BACKENDS", never)
    with pytest.raises(RuntimeError, match="no backend can run") as error:
        loss()
    assert all(f"no {name} today" in str(error.value) for name in never)


def test_the_environment_chooses_and_the_argument_wins(monkeypatch):
    monkeypatch.setenv("TOKENRL_BACKEND", "reference")
    assert backends.choose(None, CPU).name == "reference"
    monkeypatch.setenv("TOKENRL_BACKEND", "cuda")
    assert backends.choose("reference", CPU).name == "reference"


def test_cpu_tensors_get_the_cpp_kernels_and_never_the_interpreter(monkeypatch):
    monkeypatch.delenv("TOKENRL_BACKEND", raising=False)
    expected = "cpu" if backends.BACKENDS["cpu"].why_not(CPU) is None else "reference"
    assert backends.choose(None, CPU).name == expected


CHANGED = {
    "set after both": "import triton, tokenrl; os.environ['TRITON_INTERPRET'] = '1'",
    "set between": "import triton.language; os.environ['TRITON_INTERPRET'] = '1'",
    "gone after both": "os.environ['TRITON_INTERPRET'] = '1'; import tokenrl; del os.environ['TRITON_INTERPRET']",
}


@pytest.mark.skipif(backends.TRITON_REASON is not None, reason="no triton")
@pytest.mark.parametrize("when", CHANGED)
def test_a_variable_that_triton_read_before_it_changed_is_named(when):
    """Triton's functions and ours are made by what it was: it cannot run, and says so before it tries."""
    code = f"import os; {CHANGED[when]}; import torch; from tokenrl.ops.backends import BACKENDS; "
    code += "print([BACKENDS['triton'].why_not(torch.device(kind)) for kind in ('cpu', 'cuda')])"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True)
    assert ran.stdout.count("TRITON_INTERPRET changed") == 2, ran.stdout + ran.stderr


def test_an_import_leaves_the_compiler_alone():
    """It takes twice as long as torch itself; what is marked for it, is marked as it does."""
    code = "import sys, tokenrl; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked).items() <= vars(backends._cuda_refusal).items() and vars(marked)


@pytest.mark.parametrize("python,torch_version,name", [((3, 9), "2.13.0", "Python"), ((3, 11), "2.10.1", "torch")])
def test_unsupported_versions_are_named(python, torch_version, name):
    with pytest.raises(ImportError, match=f"supports {name} .* to "):
        _versions.check_versions(python, torch_version)


def test_supported_versions_pass():
    for torch_version in ("2.11.0+cu130", "2.13.0"):
        _versions.check_versions((3, 12), torch_version)


def test_metrics_are_read_once():
    _, metrics = loss(backend="reference")
    reads = []

    class Counting:
        def tolist(self, raw=metrics.raw):
            reads.append(1)
            return raw.tolist()

    counted = tokenrl.Metrics(Counting())
    assert (counted.tokens, counted.ratio_mean, counted.ess, counted.as_dict()["clip_low"]) == (2, 1.0, 1.0, 0.0)
    assert len(reads) == 1
    with pytest.raises(AttributeError, match="ratio_mean"):
        counted.ratio_median  # noqa: B018


BUILT_WITH_CUDA = pytest.mark.skipif(
    "built" in str(backends.BACKENDS["cuda"].why_not(CPU)), reason="the native part has no CUDA kernels"
)


@BUILT_WITH_CUDA
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_without_a_driver_is_refused_by_name():
    assert "the driver can CUDA 0.0, the kernels have the runtime of " in backends._ask_cuda(0)


@BUILT_WITH_CUDA
def test_a_gpu_that_the_kernels_cannot_run_on_gets_another_backend(monkeypatch):
    """Asked of its own device, and only where torch sees one: what is traced for a GPU elsewhere is not refused."""
    asked = []
    monkeypatch.setattr(backends, "_ask_cuda", lambda device: asked.append(device) or "no code for it")
    native, device = backends.BACKENDS["cuda"], torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native.why_not(device) is None and not asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert native.why_not(device) == "no code for it" and asked == [1]
    monkeypatch.delenv("TOKENRL_BACKEND", raising=False)
    assert backends.choose(None, device).name in ("triton", "reference")
    with pytest.raises(RuntimeError, match="no code for it"):
        backends.choose("cuda", device)


def test_ops_that_the_host_waits_in_are_left_out_of_cuda_graphs():
    """torch.compile would capture a sync, and die in it."""
    unsafe = torch.Tag.cudagraph_unsafe
    packets = {"linear_token_logprobs", "linear_token_logprobs_backward", "linear_policy_loss", "linear_divergence"}
    for backend in backends.BACKENDS.values():
        if (
            backend.namespace
            and backend.namespace in {"tokenrl", "tokenrl_triton"}
            and hasattr(backend.ops, "objective")
        ):
            assert all(unsafe in getattr(backend.ops, name).default.tags for name in packets), backend.name
            assert unsafe not in backend.ops.objective.default.tags
