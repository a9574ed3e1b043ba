"""What test_two_processes.py runs under torchrun: python -m torch.distributed.run two_processes.py <folders of models>.

A line "HELD <name>" for what both found to agree; an error of either ends the launch.
"""

import copy
import json
import os
import sys
import warnings

import torch
import trl
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from bench.trl_world import compared, configured, made_model, trained
from tokenrl.integrations.transformers import fuse_lm_head
from tokenrl.integrations.trl import GRPOTrainer, TokenRLConfig

WRAPPED = Accelerator.prepare_model  # in DDP, on a CPU
SHARED = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "steps": 3}
# Sharded models generate in step and are clipped by nobody here: accelerate has FSDP2 on GPUs alone.
SETTINGS = {
    "dapo": {"loss_type": "dapo", "generation_kwargs": {"min_new_tokens": 12}, "max_grad_norm": 0.0},
    "grpo of sequences, beta": {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": 0.1},
}
SHARDED = (  # model, whether its head is a shard by itself, depth
    ("qwen2", False, "one-pass"), ("qwen2", True, "one-pass"), ("qwen2", True, "hidden"),
    ("llama, tied", False, "one-pass"), ("llama, tied", False, "hidden"),
)  # fmt: skip


def held(name):
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        print(f"HELD {name}", flush=True)


def sharded(model, head_alone):
    """In place, layer by layer."""
    for layer in [*model.model.layers, *([model.lm_head] if head_alone else []), model]:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))


def gathered(made):
    for module in made.model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    return made


def trainers(folders):
    """TRL's in DDP beside ours, in DDP and in FSDP2."""
    theirs = {}
    for name, model in (("dapo", "qwen2"), ("grpo of sequences, beta", "qwen2"), ("dapo", "llama, tied")):
        options = SHARED | SETTINGS[name] | {"model": folders[model]}
        theirs[name, model] = trained(trl.GRPOTrainer, **options)
        assert theirs[name, model].accelerator.num_processes == 2
        if model == "qwen2":
            compared(theirs[name, model], trained(GRPOTrainer, tokenrl=TokenRLConfig(parity="always"), **options))
            held(f"ddp, {name}")
    Accelerator.prepare_model = lambda self, model, **_: model
    for model, head_alone, head in SHARDED:
        options = SHARED | SETTINGS["dapo"] | {"model": folders[model]}
        made = configured(GRPOTrainer, tokenrl=TokenRLConfig(head=head, parity="always"), **options)
        sharded(made.model, head_alone)
        made.train()
        compared(theirs["dapo", model], gathered(made))
        held(f"fsdp2, {model}, {head}" + ", its head alone" * head_alone)
    Accelerator.prepare_model = WRAPPED


def fused_models():
    """fuse_lm_head under FSDP2, without a word of its hooks."""
    warnings.simplefilter("error", UserWarning)
    rank = torch.distributed.get_rank()
    for kind, head_alone in (("qwen2", False), ("qwen2", True), ("llama, tied", False)):
        model = made_model(kind)
        whole = copy.deepcopy(model)
        fuse_lm_head(model)
        sharded(model, head_alone)
        ids = torch.randint(3, 29, (4, 9), generator=torch.Generator().manual_seed(1))
        halves = ids.chunk(2)
        out = model(halves[rank], labels=halves[rank])
        out.loss.backward()
        assert out.logp.shape == (2, 9)
        torch.stack([whole(half, labels=half).loss for half in halves]).mean().backward()
        for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-6, msg=f"{kind}: {name}")
        held(f"fused, {kind}" + ", its head alone" * head_alone)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainers(json.loads(sys.argv[1]))
    fused_models()
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in order
