"""Sources as kernels: a Triton function and a C++ library, in a folder that is kept, by the hash of what they are made
of."""

import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import folded, wrong
from ..ops.backends import NATIVE_REASON

PACKAGE = Path(__file__).parents[1]
KERNELS = ("fused/library.cpp", "cpu/objective.cpp", "cpu/threads.cpp")  # of csrc, beside all headers


def folder() -> Path:
    """Where what is built is kept: TOKENRL_CACHE, or tokenrl in the user's cache."""
    given = os.environ.get("TOKENRL_CACHE")
    found = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tokenrl")
    found = found / "gates"
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise wrong("TOKENRL_CACHE", f"{found}: {error.strerror}", "a folder that can be written") from None
    return found


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _kept(path: Path, make: Callable[[Path], object]) -> Path:
    """The file, made under another name first: two processes may make it at once."""
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            unfinished = Path(place, path.name)
            make(unfinished)
            unfinished.replace(path)
    return path


def triton_function(name: str, source: str) -> Callable[..., Any]:
    """Triton reads the source of a function in a file."""
    path = _kept(folder() / f"{name}_{_digest(source)}.py", lambda path: path.write_text(source))
    spec = importlib.util.spec_from_file_location(f"tokenrl_fused_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.gate


def _built() -> ModuleType:
    return importlib.import_module("tokenrl._build")


@cache
def sources() -> Path | None:
    """csrc as it is installed; None where it is not."""
    spec = importlib.util.find_spec("tokenrl.csrc")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def compiler() -> list[str] | None:
    """CXX, a command that may have arguments, or g++."""
    command = shlex.split(os.environ.get("CXX") or "g++")
    return command if shutil.which(command[0]) else None


def why_not_cpp() -> str | None:
    """Why no C++ can be compiled for the CPU backend, or None."""
    if NATIVE_REASON:
        return NATIVE_REASON
    if sources() is None:
        return "the sources of the kernels (tokenrl/csrc) are not installed"
    return None if compiler() else "no C++ compiler: install g++ or set CXX"


@dataclass(frozen=True)
class Library:
    """The compiled gate. op_library: that of the CPU backend's ops."""

    loaded: ctypes.CDLL
    op_library: ctypes.CDLL

    def add(self) -> None:
        """From here on the op `objective` runs the gate on CPU tensors."""
        self.loaded.tokenrl_fused_gate.restype = ctypes.c_void_p
        add = self.op_library.tokenrl_add_gate
        add.argtypes, add.restype = [ctypes.c_void_p], ctypes.c_char_p
        if reason := add(self.loaded.tokenrl_fused_gate()):
            raise RuntimeError(f"the C++ of a fused gate does not run: {reason.decode()} (pip install . again)")

    def values(self, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor, params: list[float]) -> Tensor:
        """As gate_values of triton_kernels/gate_values.py."""
        given = [of.contiguous() for of in (s, x, logp, advantages, t)]
        out = torch.empty(6, s.numel(), dtype=s.dtype)
        run = getattr(self.loaded, f"tokenrl_fused_values_{'double' if s.dtype == torch.float64 else 'float'}")
        run.restype = None
        run(
            (ctypes.c_void_p * 5)(*(of.data_ptr() for of in given)), (ctypes.c_double * len(params))(*params),
            ctypes.c_int64(s.numel()), (ctypes.c_void_p * 6)(*(row.data_ptr() for row in out)),
        )  # fmt: skip
        return out


def library(name: str, source: str) -> Library:
    """Compiles the gate with the objective's kernels, with their flags, for this machine's instruction set; takes
    seconds, once."""
    csrc, command, built = sources(), compiler(), _built()
    assert csrc is not None and command is not None
    op_library = ctypes.CDLL(str(PACKAGE / "_ops.so"))
    op_library.tokenrl_instruction_set.restype = ctypes.c_char_p
    isa = op_library.tokenrl_instruction_set().decode()
    flags = [*shlex.split(f"{built.CXX_FLAGS} {built.ISA_FLAGS[isa]}"), f"-DTOKENRL_ISA={isa}", "-shared"]
    texts = [path.read_text() for path in sorted(csrc.rglob("*.h"))] + [(csrc / name).read_text() for name in KERNELS]
    key = _digest(source, *command, *flags, *texts)

    def compile_to(path: Path) -> None:
        header = path.with_suffix(".h")
        header.write_text(source)
        gate = f'-DTOKENRL_FUSED_GATE="{header}"'
        done = subprocess.run(
            [*command, *flags, gate, str(csrc / KERNELS[0]), "-o", str(path)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"gate {name!r}: {command[0]} does not compile it: {folded(done.stderr)}")

    path = _kept(folder() / f"{name}_{key}.so", compile_to)
    return Library(ctypes.CDLL(str(path)), op_library)
