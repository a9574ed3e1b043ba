"""TRL's trainer in two processes, whose counts of tokens and metrics are of both, with and without tokenrl."""

import json
import math
import os
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip("trl", reason="trl is not installed (make test installs it)")

from bench.trl_world import model_folder

RUN = """
import json, os, sys
import torch, trl
from bench.trl_world import NOT_COMPARED, trained
from tokenrl.integrations.trl import GRPOTrainer, TokenRLConfig
torch.set_num_threads(1)
options = json.loads(sys.argv[1])
found = []
for trainer, own in ((trl.GRPOTrainer, {}), (GRPOTrainer, {"tokenrl": TokenRLConfig(parity="always")})):
    options |= {"model": sys.argv[2], "steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    made = trained(trainer, **options, **own)
    logged = [{k: v for k, v in line.items() if not k.startswith(NOT_COMPARED)} for line in made.state.log_history]
    found.append((logged, [p.double().sum().item() for p in made.model.parameters()]))
if made.accelerator.is_main_process:
    assert made.accelerator.num_processes == 2
    print("FOUND" + json.dumps(found), flush=True)
torch.distributed.barrier()
os._exit(0)  # gloo's threads may abort a process that ends in order
"""
OPTIONS = {
    "dapo": {"loss_type": "dapo"},
    "grpo of sequences, beta": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes(name, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, str(script), json.dumps(OPTIONS[name]), model_folder()],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (theirs, weights), (ours, ours_weights) = json.loads(ran.stdout.split("FOUND")[1].splitlines()[0])
    assert len(theirs) == len(ours) > 4
    for expected, found in zip(theirs, ours, strict=True):
        assert {k for k in found if not k.startswith("tokenrl/")} == set(expected)
        for key, value in expected.items():
            rel = 1e-4 if key == "grad_norm" else 1e-5
            assert math.isclose(value, found[key], rel_tol=rel, abs_tol=1e-6) or math.isnan(value), key
    assert weights == pytest.approx(ours_weights, rel=1e-4, abs=1e-3)
