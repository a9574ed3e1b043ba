"""The CUDA kernels compiled for every architecture that is built: no spills, no stack.

Prints registers and shared memory of each, and how many blocks of 256 threads the registers let run at once.
"""

import re
from concurrent.futures import ThreadPoolExecutor

import account
import pytest
from host_build import ARCHITECTURES, CUDA_SOURCES
from nvcc import compile_report, needs_nvcc, sass


@pytest.mark.long
@needs_nvcc
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


@needs_nvcc
@pytest.mark.parametrize(
    "source, heads", [("token_logprobs_backward", 1), ("divergence", 2), ("divergence_backward", 2)]
)
def test_16_bit_logits_are_read_and_their_gradients_written_16_bytes_at_a_time(source, heads):
    """Each head's; beside whole packs only single gradients are written."""
    of_logits = {name: text for name, text in sass(source).items() if "merge" not in name}
    found = {name: text for name, text in of_logits.items() if "BFloat16" in name or "Half" in name}
    assert found
    for name, text in found.items():
        assert text.count("LDG.E.128") >= heads, name
        written = set(re.findall(r"STG\.\S+", text))
        assert "backward" not in name or written == {"STG.E.128", "STG.E.U16"}, (name, written)
