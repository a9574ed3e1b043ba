"""The backend "sim": the op library over the CUDA kernels, compiled for the CPU, on CPU tensors."""

import functools
import warnings
from pathlib import Path

import host_build
import torch
from paths import ROOT

from tokenrl.ops import backends

TORCH = Path(torch.__file__).parent
# The stable ABI of the oldest torch that the package supports.
OPS_FLAGS = [
    "-O1", "-fPIC", "-DTOKENRL_SIM", "-DTOKENRL_LIBRARY=tokenrl_sim", "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-isystem{TORCH / 'include'}", f"-isystem{TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
]  # fmt: skip


def build_sim() -> Path:
    """The shared library that defines torch.ops.tokenrl_sim."""
    objects = host_build.compile_all(host_build.CUDA_SOURCES, host_build.PLAIN)
    objects += host_build.compile_all([ROOT / "csrc" / "ops.cpp"], OPS_FLAGS)
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu"]
    return host_build.link("tokenrl_sim.so", objects, ["-shared", *libraries])


wanted = True  # not by `make check`: the first build takes half a minute


@functools.cache
def register() -> None:
    """Adds "sim" to the backends that tests run; where it cannot be built, says why."""
    if not wanted:
        return
    if reason := host_build.why_not():
        warnings.warn(f"the CUDA kernels are not tested on the CPU: {reason}", stacklevel=2)
        return
    torch.ops.load_library(str(build_sim()))
    backends.register("tokenrl_sim")
    backends.BACKENDS["sim"] = backends.Backend(
        "sim",
        "tokenrl_sim",
        lambda device: None if device.type == "cpu" else "runs cpu tensors",
        automatic=lambda device: False,
    )
