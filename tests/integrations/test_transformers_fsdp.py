"""A fused model in two processes under FSDP2, its head a shard of its own or of the whole model's."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip("trl", reason="bench/trl_world.py, whose models these are, imports trl (make test installs it)")

RUN = """
import copy, os, sys, warnings
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from bench.trl_world import made_model
from tokenrl.integrations.transformers import fuse_lm_head
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
warnings.simplefilter("error", UserWarning)
for kind, head_alone in (("qwen2", False), ("qwen2", True), ("llama, tied", False)):
    model = made_model(kind)
    whole = copy.deepcopy(model)
    fuse_lm_head(model)
    for layer in [*model.model.layers, *([model.lm_head] if head_alone else []), model]:
        fully_shard(layer, mesh=mesh)
    ids = torch.randint(3, 29, (4, 9), generator=torch.Generator().manual_seed(1))
    halves = ids.chunk(2)
    out = model(halves[rank], labels=halves[rank])
    out.loss.backward()
    assert out.logp.shape == (2, 9)
    torch.stack([whole(half, labels=half).loss for half in halves]).mean().backward()
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-6, msg=f"{kind}: {name}")
    print("HELD", flush=True)
torch.distributed.barrier()
os._exit(0)  # gloo's threads may abort a process that ends in order
"""


def test_two_processes(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, str(script)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("HELD") == 6
