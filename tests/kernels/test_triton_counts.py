"""A Triton kernel is compiled once for all numbers of tokens, rows and sequences: Triton looks it up under one key."""

import collections
import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip("triton")

LAUNCHES = ROOT / "tests" / "support" / "launches.py"
KERNELS = {
    "statistic_kernel", "suffix_kernel", "clip_kernel", "count_kernel", "group_kernel", "gate_kernel", "score_kernel",
    "link_kernel", "token_gradients_kernel", "forward_kernel", "merge_kernel", "backward_kernel", "sweep_kernel",
    "sweep_merge_kernel", "divergence_kernel", "divergence_merge_kernel", "divergence_backward_kernel",
}  # fmt: skip


def keys(*which: str) -> dict[tuple[str, str], set[str]]:
    """Of each kernel and call, over the batches; by a process that compiles nothing (this one may interpret)."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, LAUNCHES, *which], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    found = collections.defaultdict(set)
    for row in map(json.loads, done.stdout.splitlines()):
        found[row["kernel"], row["call"]].add(row["key"])
    return found


def test_another_count_compiles_nothing_anew():
    found = keys()
    several = {launch: made for launch, made in found.items() if len(made) > 1}
    assert not several, several
    assert {kernel for kernel, _ in found} == KERNELS


def test_canary_counts_that_triton_asks_about_are_seen():
    assert {kernel for (kernel, _), made in keys("canary").items() if len(made) > 1} == KERNELS
