"""The CUDA kernels compiled for every architecture that the package ships: no spills, no stack; prints registers and shared memory."""

import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from host_build import CUDA_SOURCES

ARCHITECTURES = (80, 90, 100)
NVCC = shutil.which("nvcc")
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for 'sm_(?P<arch>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compile_report(source, folder) -> list[dict]:
    """What ptxas says of each kernel and architecture."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", *targets]
    done = subprocess.run([*command, "-c", source, "-o", folder / f"{source.stem}.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [match.groupdict() for match in REPORT.finditer(done.stdout + done.stderr)]


@pytest.mark.skipif(NVCC is None, reason="nvcc is not here: what the CUDA kernels compile to is not checked")
def test_no_kernel_spills(tmp_path, capsys):
    begin = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        reports = dict(zip(CUDA_SOURCES, pool.map(lambda source: compile_report(source, tmp_path), CUDA_SOURCES), strict=True))
    lines = [f"nvcc: {len(CUDA_SOURCES)} files for sm_{ARCHITECTURES} in {time.monotonic() - begin:.0f} s"]
    for source, rows in reports.items():
        kernels = {row["kernel"] for row in rows}
        assert kernels and len(rows) == len(kernels) * len(ARCHITECTURES), f"{source.name}: nvcc's report was not understood"
        for kernel in sorted(kernels):
            used = [r for r in rows if r["kernel"] == kernel]
            shared = re.search(r"(\d+) bytes smem", used[0]["rest"])
            registers = "/".join(r["registers"] for r in sorted(used, key=lambda r: int(r["arch"])))
            lines.append(f"{registers:>12} registers {shared[1] if shared else 0:>6} B shared  {source.name}  {kernel}")
    with capsys.disabled():
        print("", *lines, sep="\n")
    spilling = [row for rows in reports.values() for row in rows if any(int(row[k]) for k in ("stack", "stores", "loads"))]
    assert not spilling, spilling
