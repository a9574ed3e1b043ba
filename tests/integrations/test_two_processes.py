"""Two processes on gloo, in one launch: TRL's trainer beside ours, whose counts of tokens and metrics are of both, in
DDP and, held to that, with models that FSDP2 shards; fused models under FSDP2; heads and losses of trainers whose
ranks share a vocabulary or a sequence."""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip("trl", reason="trl is not installed (make test installs it)")

from adapters_on_ranks import CASES

from bench.trl_world import model_folder

HELD = (
    "ddp, dapo", "ddp, grpo of sequences, beta",
    "fsdp2, qwen2, as accelerate shards it, one-pass",
    "fsdp2, qwen2, its norm and head let go of in between, one-pass",
    "fsdp2, qwen2, its head alone, one-pass", "fsdp2, qwen2, its head alone, hidden",
    "fsdp2, llama, tied, its head with the rest, one-pass", "fsdp2, llama, tied, as accelerate shards it, hidden",
    "fused, qwen2, its head with the rest", "fused, qwen2, its head alone",
    "fused, llama, tied, its head with the rest",
)  # fmt: skip


def test_two_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    folders = json.dumps({model: model_folder(model) for model in ("qwen2", "llama, tied")})
    script = ROOT / "tests" / "support" / "two_processes.py"
    ran = subprocess.run([*command, str(script), folders], capture_output=True, text=True, env=environment, cwd=ROOT)
    found = [line.removeprefix("HELD ") for line in ran.stdout.splitlines() if line.startswith("HELD ")]
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert found == [*HELD, *CASES]
