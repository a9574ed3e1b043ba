"""The CUDA sources as nvcc compiles them: objects, what ptxas says of each kernel, and the machine code."""

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from host_build import ARCHITECTURES, BUILD, digest, headers
from made_once import made_once
from paths import ROOT

TARGETS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(
    NVCC is None, reason="nvcc is not here: what the CUDA kernels compile to is not checked"
)
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for 'sm_(?P<arch>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def built_by_setup(name: str) -> Path | None:
    """The object that setup.py built of a source for at least our architectures, if ninja calls it up to date."""
    for folder in (ROOT / "build").glob("native-*-cuda"):
        made, rules = folder / f"{name}.cu.o", (folder / "build.ninja").read_text()
        if made.exists() and all(target in rules for target in TARGETS):
            ninja = [sys.executable, "-m", "ninja", "-C", str(folder), "-n", str(made)]
            if "no work to do" in subprocess.run(ninja, capture_output=True, text=True).stdout:
                return made
    return None


def compiled(source: Path) -> Path:
    """The object of a source; beside it, as .log, what ptxas says of each kernel and architecture.

    Kept in build/host by content; nvcc runs only where setup.py has not built the very same.
    """
    command = [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", *TARGETS]

    def make(unfinished: Path) -> None:
        log = target.with_suffix(".log")
        if built := built_by_setup(source.stem):
            shutil.copy(f"{built}.log", log)
            shutil.copy(built, unfinished)
            return
        done = subprocess.run([*command, "-c", source, "-o", unfinished], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        log.write_text(done.stdout + done.stderr)

    target = BUILD / f"{source.stem}-{digest(headers(), source.read_text(), *command)}.cu.o"
    return made_once(target, make)


def compile_report(source: Path) -> list[dict]:
    """Per kernel and architecture: registers, stack, spills."""
    text = compiled(source).with_suffix(".log").read_text()
    return [match.groupdict() for match in REPORT.finditer(text) if int(match["arch"]) in ARCHITECTURES]


@functools.cache
def sass(source: str) -> dict[str, str]:
    """What the kernels of a source compile to on sm_90, by their mangled names."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
    cuobjdump = f"{triton.__path__[0]}/backends/nvidia/bin/cuobjdump"
    made = compiled(ROOT / "csrc" / "cuda" / f"{source}.cu")
    text = subprocess.run([cuobjdump, "-sass", "-arch", "sm_90", made], capture_output=True, text=True).stdout
    return {kernel.split("\n", 1)[0]: kernel for kernel in text.split("Function : ")[1:]}
