"""The CUDA kernels compiled for every architecture that the package ships: no spills, no stack.

Prints registers and shared memory of each.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from host_build import BUILD, CUDA_SOURCES, ROOT, digest, headers

ARCHITECTURES = (80, 90, 100)
NVCC = shutil.which("nvcc")
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for 'sm_(?P<arch>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compile_report(source) -> list[dict]:
    """What ptxas says of each kernel and architecture; kept in build/host for as long as the sources stay the same."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", *targets]
    log = BUILD / f"{source.stem}-{digest(headers(ROOT), source.read_text(), *command)}.ptxas"
    if not log.exists():
        done = subprocess.run([*command, "-c", source, "-o", log.with_suffix(".cu.o")], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        log.write_text(done.stdout + done.stderr)
    return [match.groupdict() for match in REPORT.finditer(log.read_text())]


@pytest.mark.skipif(NVCC is None, reason="nvcc is not here: what the CUDA kernels compile to is not checked")
def test_no_kernel_spills(capsys):
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        reports = dict(zip(CUDA_SOURCES, pool.map(compile_report, CUDA_SOURCES), strict=True))
    lines = [f"registers on sm_{'/'.join(map(str, ARCHITECTURES))}:"]
    for source, rows in reports.items():
        kernels = {row["kernel"] for row in rows}
        assert kernels and len(rows) == len(kernels) * len(ARCHITECTURES), (
            f"{source.name}: nvcc's report was not understood"
        )
        for kernel in sorted(kernels):
            used = [r for r in rows if r["kernel"] == kernel]
            shared = re.search(r"(\d+) bytes smem", used[0]["rest"])
            registers = "/".join(r["registers"] for r in sorted(used, key=lambda r: int(r["arch"])))
            lines.append(f"{registers:>12} registers {shared[1] if shared else 0:>6} B shared  {source.name}  {kernel}")
    with capsys.disabled():
        print("", *lines, sep="\n")
    spilling = [
        row for rows in reports.values() for row in rows if any(int(row[k]) for k in ("stack", "stores", "loads"))
    ]
    assert not spilling, spilling
