"""The CUDA kernels compiled for every architecture that is built: no spills, no stack.

Prints registers and shared memory of each, and how many blocks of 256 threads the registers let run at once.
"""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import account
import pytest
from host_build import ARCHITECTURES, BUILD, CUDA_SOURCES, digest, headers
from made_once import made_once
from paths import ROOT

TARGETS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
NVCC = shutil.which("nvcc")
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
    text = compiled(source).with_suffix(".log").read_text()
    return [match.groupdict() for match in REPORT.finditer(text) if int(match["arch"]) in ARCHITECTURES]


@pytest.mark.long
@pytest.mark.skipif(NVCC is None, reason="nvcc is not here: what the CUDA kernels compile to is not checked")
def test_no_kernel_spills(record_property):
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
            blocks = "/".join(str(65536 // (256 * (-(-int(r) // 8) * 8))) for r in registers.split("/"))
            share = f"{blocks:>8} blocks per SM {shared[1] if shared else 0:>6} B shared"
            lines.append(f"{registers:>12} registers {share}  {source.name}  {kernel}")
    record_property(account.SHOWN, "\n".join(lines))
    spilling = [
        row for rows in reports.values() for row in rows if any(int(row[k]) for k in ("stack", "stores", "loads"))
    ]
    assert not spilling, spilling


def steady_loops(kernel: str) -> list[list[str]]:
    """The instructions of each loop of a kernel's SASS that has at least four 16-byte loads and no such loop inside."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", kernel)]
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"BRA\S* .*?0x([0-9a-f]+)", text))]
    spans = [(first, last) for first, last in jumps if first < last]
    wide = [s for s in spans if sum("LDG.E.128" in text for at, text in code if s[0] <= at <= s[1]) >= 4]
    inner = [s for s in wide if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in wide)]
    return [[text for at, text in code if first <= at <= last] for first, last in inner]


def sass(source: str) -> dict[str, str]:
    """What the kernels of a source compile to, by their mangled names."""
    cuobjdump = pytest.importorskip("triton").__path__[0] + "/backends/nvidia/bin/cuobjdump"
    made = compiled(ROOT / "csrc" / "cuda" / f"{source}.cu")
    text = subprocess.run([cuobjdump, "-sass", "-arch", "sm_90", made], capture_output=True, text=True).stdout
    return {kernel.split("\n", 1)[0]: kernel for kernel in text.split("Function : ")[1:]}


@pytest.mark.skipif(NVCC is None, reason="nvcc is not here: what the CUDA kernels compile to is not checked")
@pytest.mark.parametrize("source, per_logit", [("token_logprobs", 1), ("token_logprobs_backward", 1)])
def test_log_probs_read_16_bytes_and_take_one_exponential_per_logit(source, per_logit):
    """In the steady loop over bf16 and fp32 logits; the maximum that moves costs one more per load, where it does."""
    found = {}
    for name, kernel in sass(source).items():
        for logit, size in (("BFloat16", 8), ("IffN", 4)):
            if logit in name and ("SoftmaxOnly" in name or "OneId" in name) and "merge" not in name:
                found[logit] = (steady_loops(kernel), size)
    assert set(found) == {"BFloat16", "IffN"}
    for loops, size in found.values():
        assert loops, f"no loop with 16-byte loads in {source}"
        for loop in loops:
            loads = sum("LDG.E.128" in text for text in loop)
            exponentials = sum("MUFU.EX2" in text for text in loop)
            assert exponentials <= loads * (per_logit * size + 1), (loads, exponentials)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not here: what the CUDA kernels compile to is not checked")
@pytest.mark.parametrize("source, heads", [("token_logprobs_backward", 1), ("divergence", 2)])
def test_16_bit_logits_are_read_and_their_gradients_written_16_bytes_at_a_time(source, heads):
    """Each head's; beside whole packs only single gradients are written."""
    found = {name: text for name, text in sass(source).items() if "BFloat16" in name or "Half" in name}
    assert found
    for name, text in found.items():
        assert text.count("LDG.E.128") >= heads, name
        written = set(re.findall(r"STG\.\S+", text))
        assert "backward" not in name or written == {"STG.E.128", "STG.E.U16"}, (name, written)
