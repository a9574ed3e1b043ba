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
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    assert done.returncode == 0, f"{failed}\n{done.stderr[-3000:]}"
    held = [line.removeprefix("HELD ") for line in done.stdout.splitlines() if line.startswith("HELD ")]
    assert held == [f"{world} {name}" for world in WORLDS for name in of_world(world)]
