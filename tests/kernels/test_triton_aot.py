"""Every Triton kernel compiled for the GPU generations that are built, without a GPU: no spills, wide loads."""

import functools
import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from host_build import ARCHITECTURES, digest
from made_once import made_once
from paths import ROOT

from tokenrl.objectives.divergences import DIVERGENCES

triton = pytest.importorskip("triton")
WEIGHT = importlib.import_module("tokenrl.triton_kernels.divergences").WEIGHT

AOT = ROOT / "tests" / "support" / "aot.py"
BUILD = ROOT / "build" / "triton"
WHOLE = 90  # of which everything is compiled, a minute and more; of the others a fifth each, as no kind comes in fives
KERNELS = {
    "objective_kernel", "statistic_kernel", "suffix_kernel", "clip_kernel", "count_kernel", "group_kernel",
    "gate_kernel", "forward_kernel", "merge_kernel", "backward_kernel", "divergence_kernel",
    "divergence_merge_kernel", "divergence_backward_kernel", "sweep_kernel", "sweep_merge_kernel",
    "score_kernel", "link_kernel", "token_gradients_kernel",
}  # fmt: skip


def compiled(arch: int, *which: str) -> list[dict]:
    """What aot.py prints, in a process that compiles (this one may interpret)."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, AOT, str(arch), *which]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def kernels(arch: int) -> list[dict]:
    """Of what aot.py compiles, kept in build/triton by the content of what it depends on."""
    which = "all" if arch == WHOLE else "fifth"
    made = made_once(
        BUILD / f"sm_{arch}-{sources()}.json", lambda path: path.write_text(json.dumps(compiled(arch, which)))
    )
    return json.loads(made.read_text())


@functools.cache
def sources() -> str:
    folders = (ROOT / "tokenrl", ROOT / "triton_kernels")
    paths = [AOT, *(path for folder in folders for path in sorted(folder.rglob("*.py")))]
    return digest(triton.__version__, torch.__version__, *(path.read_text() for path in paths))


def table(rows: list[dict]) -> str:
    line = (
        "sm_{arch:<4} {kernel:<26} {case:<56} {reg:>4} registers {stack:>4} B stack {spills:>4} spills {shared:>6} B "
        "shared {warps:>3} warps {occupancy:>5.0%} occupancy {seconds:>6} s"
    )
    return "\n".join(line.format(**row) for row in rows)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(arch):
    rows = kernels(arch)
    print(table(rows))
    found = {row["kernel"] for row in rows}
    assert found == KERNELS if arch == WHOLE else {"objective_kernel", "forward_kernel", "backward_kernel"} < found
    spilling = [row for row in rows if row["spills"] or row["local"]]
    assert not spilling, "\n" + table(spilling)


def test_logits_are_read_16_bytes_at_a_time():
    rows = [row for row in kernels(WHOLE) if row["kernel"] == "backward_kernel"]
    rows += [row for row in kernels(WHOLE) if row["kernel"] == "forward_kernel" and "V=151936" in row["case"]]
    # Two dtypes; a forward and two backwards of four calls on a vocabulary that 16 bytes divide, the latter of two on
    # an odd one.
    assert len(rows) == 2 * (4 * (1 + 2) + 2 * 2)
    assert all(row["wide_loads"] >= 2 for row in rows), "\n" + table(rows)


def test_a_plain_row_costs_one_exponential_per_logit():
    """And in the forward one per turn, which rescales the sums where their maximum moves."""
    rows = [row for row in kernels(WHOLE) if row["kernel"] in ("forward_kernel", "backward_kernel")]
    rows = [row for row in rows if row["case"].endswith((" plain", " split")) and row["loop_loads"]]
    # Of each dtype: forward and backward of the even vocabulary, plain and split; the plain backward of the odd one.
    assert len(rows) == 2 * (2 * 2 + 1)
    for row in rows:
        logits = row["loop_loads"] * (8 if row["case"].startswith("bfloat16") else 4)
        rescaling = 1 if row["kernel"] == "forward_kernel" else 0
        assert 0 < row["loop_exponentials"] <= logits + rescaling, row


@pytest.mark.parametrize("logit, most", [("bfloat16", 9.0), ("float32", 8.5)])
def test_what_the_forward_issues_per_logit(logit, most):
    """Per turn of its loop, instructions of all kinds; csrc/cuda takes 7.25 (test_issue_slots.py)."""
    rows = [row for row in kernels(WHOLE) if row["case"] == f"{logit} V=151936 plain"]
    (row,) = (row for row in rows if row["kernel"] == "forward_kernel")
    logits = row["loop_loads"] * (8 if logit == "bfloat16" else 4)
    assert 0 < row["loop_instructions"] <= most * logits, row


def test_both_heads_of_a_divergence_are_read_16_bytes_at_a_time():
    """In the steady loop, whose exponentials are one per logit, and another per pair where a kind has more powers; a
    sweep has one per block and head, which rescales the sums when a maximum moves."""
    rows = [row for row in kernels(WHOLE) if row["kernel"] == "divergence_backward_kernel"]
    forwards = [row for row in kernels(WHOLE) if row["kernel"] in ("divergence_kernel", "sweep_kernel")]
    rows += [row for row in forwards if "V=151936" in row["case"]]
    # Every kind, and two split ones: the backwards of both sides, and of the even vocabulary the sweeps, and the sums
    # of those kinds that do not weigh logs.
    even = [kind for k, kind in enumerate(DIVERGENCES) if k // 4 % 2 == 0]
    summed = [kind for kind in (*even, "forward_kl", "jsd") if kind not in WEIGHT]
    assert len(rows) == (len(DIVERGENCES) + 2) * 2 + len(even) + 2 + len(summed)
    for row in rows:
        dtype, _, kind, what, *_ = row["case"].split()
        assert row["loop_loads"] == (2 if dtype == "bfloat16" else 4), row
        logits = row["loop_loads"] * (8 if dtype == "bfloat16" else 4)
        sweeps = row["kernel"] == "sweep_kernel"
        more = 2 if sweeps else logits // 2 if kind in ("squared_hellinger", "alpha_beta") else 0
        assert what == "everything" or 0 < row["loop_exponentials"] <= logits + more, row


def test_canary_a_spilling_kernel_is_seen():
    (row,) = compiled(90, "canary")
    assert row["stack"] > 0 and row["spills"] > 0, row
