"""Compiles C++ and, as plain C++ against csrc/host/cuda_on_cpu.h, the CUDA sources.

Objects and programs are kept in build/host by their content: all tests that want the same one share it.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from made_once import made_once
from paths import CPP_HOST, ROOT

BUILD = ROOT / "build" / "host"
# Those without a kernel, which ask the CUDA runtime, are left out.
CUDA_SOURCES = sorted(
    path for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.stem not in ("attributes", "tickets")
)
# The GPU generations that the tests compile for: those of the build, H200's among them.
BUILT_FOR = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0").replace(" ", ";").split(";")
ARCHITECTURES = sorted({90, *(int(name.split("+")[0].replace(".", "")) for name in BUILT_FOR)})
# Of the CUDA sources in the backend "sim" and in the drivers, which so are the same objects.
PLAIN = ["-O1", "-fPIC", "-include", str(CPP_HOST / "barriers.h")]


def why_not() -> str | None:
    """The reason why nothing can be compiled here."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"csrc/host/fibres.h switches stacks in x86-64 assembly, this is {platform.machine()}"
    return None if shutil.which("g++") else "there is no g++"


def digest(*parts) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


@functools.cache
def headers() -> str:
    """Everything that a source can include."""
    paths = [p for folder in (ROOT / "csrc", CPP_HOST) for p in folder.rglob("*") if p.suffix in (".h", ".cuh")]
    return digest(*(part for p in sorted(paths) for part in (p.name, p.read_text())))


def _run(target: Path, command: list[str]) -> Path:
    def make(unfinished: Path) -> None:
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")

    return made_once(target, make)


def compile_all(sources: list[Path], flags: list[str]) -> list[Path]:
    """One object per source, two compilers at a time."""

    def compile_one(source: Path) -> Path:
        name = f"{source.stem}-{digest(headers(), source.name, source.read_text(), *flags)}.o"
        return _run(BUILD / name, ["g++", "-std=c++17", *flags, "-x", "c++", "-c", str(source)])

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def link(name: str, objects: list[Path], flags: list[str]) -> Path:
    return _run(BUILD / f"{name}-{digest(*objects, *flags)}", ["g++", *map(str, objects), *flags])
