"""examples/ray_workers.py by Ray; its workers without Ray are a case of tests/integrations/test_two_processes.py."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (pip install tokenrl[ray])"
)


def test_workers_of_ray_train_as_one_process_does():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "examples" / "ray_workers.py"), "2", "2"]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    steps = re.findall(r"^step \d: loss (\S+), of one process (\S+)$", ran.stdout, re.M)
    assert len(steps) == 4 and all(ours == theirs for ours, theirs in steps), ran.stdout
    assert float(re.search(r"from one process: (\S+)$", ran.stdout, re.M)[1]) < 1e-12
