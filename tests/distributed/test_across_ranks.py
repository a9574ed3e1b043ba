"""A vocabulary and a batch on 2, 3 and 4 processes of gloo, in one launch of many cases: against the op on one."""

import os
import subprocess
import sys

from paths import ROOT
from rank_process import WORLDS, of_world


def test_every_case_holds_on_every_rank(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / "support" / "rank_process.py"), str(tmp_path / "store")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    ranks = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(max(WORLDS))]
    outputs = [rank.communicate(timeout=900) for rank in ranks]
    failed = [out[-500:] + error[-2000:] for (out, error), rank in zip(outputs, ranks, strict=True) if rank.returncode]
    assert not failed, failed[0]
    held = [line.removeprefix("HELD ") for line in outputs[0][0].splitlines() if line.startswith("HELD ")]
    assert held == [f"{world} {name}" for world in WORLDS for name in of_world(world)]
