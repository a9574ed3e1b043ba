"""What keeps a machine from a faster backend, each with its remedy: what `tokenrl doctor` ends with."""

import ctypes
import importlib
import importlib.util
import re
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _versions
from .._versions import installed
from ..ops import backends

REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall . in a checkout"
DRIVERS = {11: "450.80", 12: "525.60", 13: "580.65"}  # CUDA release notes: the oldest driver of each major version
Version = tuple[int, ...]


@dataclass(frozen=True)
class Remedy:
    """what: it is about. why: it stands in the way. remedy: what to install or to do."""

    what: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Machine:
    """What a remedy depends on.

    gpus: (name, compute capability) of those that torch sees. gpu_device: the system has one, seen or not. driver: the
    newest CUDA that it can. native, bindings, cuda, triton_backend: why these parts of the package cannot run, or None.
    runtime, architectures: of the CUDA that is built in. compiler, nvcc: where they are. headers: Python's.
    """

    gpus: tuple[tuple[str, Version], ...] = ()
    gpu_device: bool = False
    torch_cuda: str | None = None
    driver: Version | None = None
    native: str | None = None
    bindings: str | None = None
    cuda: str | None = None
    triton_backend: str | None = None
    runtime: Version | None = None
    architectures: tuple[str, ...] = ()
    triton: Version | None = None
    numpy: Version = (2, 3)
    compiler: str | None = None
    nvcc: str | None = None
    headers: bool = True


def version_of(text: str | None) -> Version | None:
    """ "2.13.0+cpu" -> (2, 13)."""
    found = re.match(r"(\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else None


def shown(version: Version | None) -> str:
    return ".".join(map(str, version or ()))


def build_info() -> dict[str, Any]:
    """What the native extension says about its build; the reason where it is missing."""
    if importlib.util.find_spec("tokenrl._bindings") is None:
        built = importlib.import_module("tokenrl._build") if importlib.util.find_spec("tokenrl._build") else None
        return {"tokenrl._bindings": getattr(built, "BINDINGS_REASON", None) or "not built"}
    try:
        return dict(importlib.import_module("tokenrl._bindings").build_info())
    except ImportError as error:
        return {"tokenrl._bindings": f"does not import: {error}"}


def driver_version() -> Version | None:
    """The newest CUDA version that the NVIDIA driver can, asked of it without torch, whose own CUDA may be missing."""
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return (number.value // 1000, number.value % 1000 // 10) if number.value else None


def here() -> Machine:
    """This machine."""
    gpu, info = torch.device("cuda"), build_info()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(
        gpus=tuple((torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)),
        gpu_device=any(Path("/dev").glob("nvidia[0-9]*")),
        torch_cuda=torch.version.cuda,
        driver=driver_version(),
        native=backends.NATIVE_REASON,
        bindings=info.get("tokenrl._bindings"),
        cuda=backends.BACKENDS["cuda"].why_not(gpu),
        triton_backend=backends.BACKENDS["triton"].why_not(gpu),
        runtime=version_of(info.get("cuda")),
        architectures=tuple(info.get("cuda_architectures", ())),
        triton=version_of(installed("triton")),
        numpy=version_of(installed("numpy")) or (0,),
        compiler=shutil.which("c++") or shutil.which("g++"),
        nvcc=shutil.which("nvcc"),
        headers=Path(sysconfig.get_path("include"), "Python.h").exists(),
    )


def image(architectures: tuple[str, ...], capability: Version) -> str | None:
    """Whether a GPU finds its code in what was built for these: "code", "PTX" (which it compiles first), or None."""
    found = [(version_of(arch) or (0, 0), arch) for arch in architectures]
    if any(v[0] == capability[0] and v[1] <= capability[1] for v, _ in found):
        return "code"
    return "PTX" if any(arch.endswith("+PTX") and v <= capability for v, arch in found) else None


def remedies(machine: Machine) -> list[Remedy]:
    """Those of this machine, the nearest to a faster backend first."""
    found = [*_native(machine), *_torch(machine), *_cuda(machine), *_images(machine), *_triton(machine)]
    return found + list(_headers(machine))


def _native(machine: Machine) -> Iterator[Remedy]:
    if machine.native is None:
        return
    remedy = f"build it: {REBUILD}"
    if "TOKENRL_NATIVE=0" in machine.native:
        remedy = f"without TOKENRL_NATIVE in the environment: {REBUILD}"
    elif machine.compiler is None:
        remedy = f"install a C++ compiler (apt-get install g++) or set CXX, then {REBUILD}"
    yield Remedy("backends cpu and cuda", machine.native, remedy)


def _torch(machine: Machine) -> Iterator[Remedy]:
    if not machine.gpu_device or machine.gpus:
        return
    if machine.torch_cuda is None:
        why = "torch is built without CUDA, beside an NVIDIA GPU"
        yield Remedy("torch", why, "pip install torch from https://download.pytorch.org/whl/cu126 or newer")
    else:
        why = f"torch, built with CUDA {machine.torch_cuda}, does not see the GPU (its driver: CUDA "
        why += f"{shown(machine.driver) or 'not found'})"
        yield Remedy("torch", why, "update the NVIDIA driver, or install a torch of an older CUDA")


def _cuda(machine: Machine) -> Iterator[Remedy]:
    if not machine.gpus or machine.torch_cuda is None:  # None: ROCm's, which Triton serves
        return
    if machine.cuda and machine.native is None:
        toolkit = "" if machine.nvcc else "install the CUDA toolkit (nvcc; CUDA_HOME names its folder), then "
        yield Remedy("backend cuda", machine.cuda, f"{toolkit}TOKENRL_CUDA=1 {REBUILD}")
    # A runtime runs on drivers of its own major version and newer (CUDA's minor version compatibility).
    if machine.runtime and machine.driver and machine.driver[0] < machine.runtime[0]:
        why = f"the driver can CUDA {shown(machine.driver)}, the kernels have the runtime of {shown(machine.runtime)}"
        oldest = DRIVERS.get(machine.runtime[0], "one for it")
        remedy = f"update the driver to {oldest} or newer, or with an nvcc of CUDA {machine.driver[0]}: {REBUILD}"
        yield Remedy("NVIDIA driver", why, f"{remedy}; until then TOKENRL_BACKEND=triton")


def _images(machine: Machine) -> Iterator[Remedy]:
    for name, capability in dict.fromkeys(machine.gpus if machine.architectures else ()):
        found, arch = image(machine.architectures, capability), shown(capability)
        built = " ".join(machine.architectures)
        rebuilt = f"TORCH_CUDA_ARCH_LIST={arch} TOKENRL_CUDA=1 {REBUILD}"
        if found is None:
            why = f"no kernel image for its compute capability {arch}: built for {built}"
            yield Remedy(name, why, f"{rebuilt}; until then TOKENRL_BACKEND=triton")
        elif found == "PTX":
            why = f"only PTX for its compute capability {arch}: compiled anew at the first call (built for {built})"
            yield Remedy(name, why, rebuilt)


def _triton(machine: Machine) -> Iterator[Remedy]:
    oldest = shown(_versions.TRITON)
    if machine.triton and machine.triton < _versions.TRITON:
        why = f"{shown(machine.triton)} is older than {oldest}, the oldest that is tested"
        yield Remedy("triton", why, f"pip install 'triton>={oldest}'")
    elif machine.triton == _versions.TRITON and machine.numpy >= (2, 4):
        why = f"the interpreter of triton {oldest} fails with numpy {shown(machine.numpy)}"
        yield Remedy("triton", why, "pip install 'numpy<2.4', or a newer triton; kernels on a GPU are not affected")
    if not machine.gpus:
        return
    if machine.triton_backend:
        remedy = "unset TRITON_INTERPRET" if "TRITON_INTERPRET" in machine.triton_backend else ""
        yield Remedy("backend triton", machine.triton_backend, remedy or f"pip install 'triton>={oldest}'")
    elif machine.compiler is None or not machine.headers:
        missing = "a C compiler" if machine.compiler is None else "Python.h"
        why = f"it builds its launcher at the first call, which needs {missing}"
        yield Remedy("backend triton", why, "apt-get install gcc python3-dev, or set CC")


def _headers(machine: Machine) -> Iterator[Remedy]:
    if machine.native is None and machine.bindings:
        remedy = "" if machine.headers else "apt-get install python3-dev, then "
        why = f"{machine.bindings}: no build information, no machine limits of our own"
        yield Remedy("tokenrl._bindings", why, f"{remedy}{REBUILD}")
