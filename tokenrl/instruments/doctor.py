"""`tokenrl doctor`: versions, the build, each backend, whether it can run here or why not, and what would help."""

import dataclasses
import platform
import shutil
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .. import _versions
from .._versions import installed
from ..ops.backends import BACKENDS, choose
from .remedies import build_info, here, remedies, shown


def versions() -> list[tuple[str, str, str]]:
    """(what, version or place, supported)."""
    ranges = {name: " to ".join(map(shown, span))
              for name, span in (("Python", _versions.PYTHON), ("torch", _versions.TORCH))}  # fmt: skip
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = {name: installed(name) or "not installed" for name in ("tokenrl", "triton", "numpy")}
    return [
        ("tokenrl", packages["tokenrl"], ""),
        ("Python", platform.python_version(), ranges["Python"]),
        ("torch", torch.__version__, ranges["torch"]),
        ("triton", packages["triton"], f"optional, {shown(_versions.TRITON)} or newer"),
        ("numpy", packages["numpy"], ""),
        ("C++ compiler", shutil.which("c++") or shutil.which("g++") or "not found", "to build"),
        ("nvcc", shutil.which("nvcc") or "not found", "optional, to build for CUDA"),
        ("GPU", gpu, "optional"),
    ]


def devices() -> list[torch.device]:
    return [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]


def findings() -> dict[str, Any]:
    """All of it, as JSON has it."""
    return {
        "versions": {what: {"here": found, "supported": supported} for what, found, supported in versions()},
        "build": build_info(),
        "backends": {name: {d.type: b.why_not(d) or "can run" for d in devices()} for name, b in BACKENDS.items()},
        "fastest": {device.type: choose(None, device).name for device in devices()},
        "remedies": [dataclasses.asdict(remedy) for remedy in remedies(here())],
    }


def print_doctor(console: Console) -> None:
    """Prints the versions, the build, the table of backends and the remedies."""
    found = findings()
    table = Table("", "here", "supported", box=box.SIMPLE_HEAD)
    for what, row in found["versions"].items():
        table.add_row(*map(escape, (what, row["here"], row["supported"])))
    console.print(table, highlight=False)
    lines = (f"    {key}: {value}" for key, value in found["build"].items())
    console.print("  build", *lines, sep="\n", highlight=False, markup=False)
    table = Table("backend", *(f"on {device.type}" for device in devices()), box=box.SIMPLE_HEAD)
    for name, reasons in found["backends"].items():
        table.add_row(name, *map(escape, reasons.values()))
    console.print(table, highlight=False)
    fastest = ", ".join(f"{name} on {device}" for device, name in found["fastest"].items())
    console.print(f"  a call that names no backend gets {fastest}", highlight=False)
    console.print("  on a GPU cuda before triton: fewer instructions per logit, as counted", highlight=False)
    for remedy in found["remedies"]:
        console.print(Padding(Text(f"{remedy['what']}: {remedy['why']}"), (1, 0, 0, 2)))
        console.print(Padding(Text(remedy["remedy"]), (0, 0, 0, 6)))
    if not found["remedies"]:
        console.print("  nothing is missing for a faster one", highlight=False)
