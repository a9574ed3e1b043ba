"""`tokenrl doctor`: versions, the build, and each backend, whether it can run here or why not."""

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import _versions
from ..ops.backends import BACKENDS


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> list[tuple[str, str, str]]:
    """(what, version or place, supported)."""
    ranges = {name: " to ".join(".".join(map(str, v)) for v in span)
              for name, span in (("Python", _versions.PYTHON), ("torch", _versions.TORCH))}  # fmt: skip
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        ("tokenrl", package_version("tokenrl"), ""),
        ("Python", platform.python_version(), ranges["Python"]),
        ("torch", torch.__version__, ranges["torch"]),
        ("triton", package_version("triton"), "optional"),
        ("numpy", package_version("numpy"), ""),
        ("C++ compiler", shutil.which("c++") or shutil.which("g++") or "not found", "to build"),
        ("nvcc", shutil.which("nvcc") or "not found", "optional, to build for CUDA"),
        ("GPU", gpu, "optional"),
    ]


def build_info() -> dict[str, object]:
    """What the native extension says about its build; the reason where it is missing."""
    if importlib.util.find_spec("tokenrl._bindings") is None:
        built = importlib.import_module("tokenrl._build") if importlib.util.find_spec("tokenrl._build") else None
        return {"tokenrl._bindings": getattr(built, "BINDINGS_REASON", None) or "not built"}
    try:
        return dict(importlib.import_module("tokenrl._bindings").build_info())
    except ImportError as error:
        return {"tokenrl._bindings": f"does not import: {error}"}


def print_doctor(console: Console) -> None:
    """Prints the versions, the build and the table of backends."""
    table = Table("", "here", "supported", box=box.SIMPLE_HEAD)
    for row in versions():
        table.add_row(*map(escape, row))
    console.print(table, highlight=False)
    lines = (f"    {key}: {value}" for key, value in build_info().items())
    console.print("  build", *lines, sep="\n", highlight=False, markup=False)
    devices = [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]
    table = Table("backend", *(f"on {device.type}" for device in devices), box=box.SIMPLE_HEAD)
    for name, backend in BACKENDS.items():
        table.add_row(name, *(escape(backend.why_not(device) or "can run") for device in devices))
    console.print(table, highlight=False)
