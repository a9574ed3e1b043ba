"""Compiles C++ and, as plain C++ against csrc/host/cuda_on_cpu.h, the CUDA sources.

Objects are kept in build/host by their content.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paths import CPP_HOST, ROOT

BUILD = ROOT / "build" / "host"
# attributes.cu asks the CUDA runtime, and has no kernel.
CUDA_SOURCES = sorted(path for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.stem != "attributes")


def why_not() -> str | None:
    """The reason why nothing can be compiled here."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"csrc/host/fibres.h switches stacks in x86-64 assembly, this is {platform.machine()}"
    return None if shutil.which("g++") else "there is no g++"


def digest(*parts) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def headers(tree: Path) -> str:
    """Everything that a source can include."""
    paths = [
        p
        for folder in (tree / "csrc", CPP_HOST)
        for p in folder.rglob("*")
        if p.suffix in (".h", ".cuh")
    ]
    return digest(*(part for p in sorted(paths) for part in (p.name, p.read_text())))


def _make(target: Path, command: list[str]) -> None:
    """Whole or not at all: another test run may be making the same file."""
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    unfinished.replace(target)


def compile_all(sources: list[Path], flags: list[str], tree: Path = ROOT) -> list[Path]:
    """One object per source, two compilers at a time. tree: the folder whose csrc the sources include."""
    included = headers(tree)

    def compile_one(source: Path) -> Path:
        target = BUILD / f"{source.stem}-{digest(included, source.name, source.read_text(), *flags)}.o"
        if not target.exists():
            _make(target, ["g++", "-std=c++17", *flags, "-x", "c++", "-c", str(source)])
        return target

    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def link(name: str, objects: list[Path], flags: list[str]) -> Path:
    target = BUILD / f"{name}-{digest(*objects, *flags)}"
    if not target.exists():
        _make(target, ["g++", *map(str, objects), *flags])
    return target
