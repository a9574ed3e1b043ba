"""What test_two_processes.py runs under torchrun: python -m torch.distributed.run two_processes.py <folders of models>.

A line "HELD <name>" for what both found to agree; an error of either ends the launch.
"""

import copy
import json
import os
import sys
import warnings

import adapters_on_ranks
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
WITH_ROOT, ALONE, OF_ACCELERATE = "its head with the rest", "its head alone", "as accelerate shards it"
LET_GO = "its norm and head let go of in between"
SHARDED = (
    ("qwen2", OF_ACCELERATE, "one-pass"), ("qwen2", LET_GO, "one-pass"),
    ("qwen2", ALONE, "one-pass"), ("qwen2", ALONE, "hidden"),
    ("llama, tied", WITH_ROOT, "one-pass"), ("llama, tied", OF_ACCELERATE, "hidden"),
)  # fmt: skip


def held(name):
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        print(f"HELD {name}", flush=True)


def sharded(model, layout):
    """In place, layer by layer."""
    norm, embedding, head = model.model.norm, model.model.embed_tokens, model.lm_head
    own = {WITH_ROOT: [], ALONE: [head], LET_GO: [[norm, head]], OF_ACCELERATE: [embedding, [norm, head]]}[layout]
    if layout == OF_ACCELERATE and head.weight is embedding.weight:
        own = [[norm, embedding, head]]
    for modules in [*model.model.layers, *own, model]:
        stays = {"reshard_after_forward": False} if layout == OF_ACCELERATE and isinstance(modules, list) else {}
        fully_shard(modules, mesh=init_device_mesh("cpu", (2,)), **stays)


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
    for model, layout, head in SHARDED:
        options = SHARED | SETTINGS["dapo"] | {"model": folders[model]}
        made = configured(GRPOTrainer, tokenrl=TokenRLConfig(head=head, parity="always"), **options)
        sharded(made.model, layout)
        made.train()
        compared(theirs["dapo", model], gathered(made))
        held(f"fsdp2, {model}, {layout}, {head}")
    Accelerator.prepare_model = WRAPPED


def fused_models():
    """fuse_lm_head under FSDP2, without a word of its hooks."""
    warnings.simplefilter("error", UserWarning)
    rank = torch.distributed.get_rank()
    for kind, layout in (("qwen2", WITH_ROOT), ("qwen2", ALONE), ("llama, tied", WITH_ROOT)):
        model = made_model(kind)
        whole = copy.deepcopy(model)
        fuse_lm_head(model)
        sharded(model, layout)
        ids = torch.randint(3, 29, (4, 9), generator=torch.Generator().manual_seed(1))
        halves = ids.chunk(2)
        out = model(halves[rank], labels=halves[rank])
        out.loss.backward()
        assert out.logp.shape == (2, 9)
        torch.stack([whole(half, labels=half).loss for half in halves]).mean().backward()
        for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-4, atol=1e-6, msg=f"{kind}: {name}")
        held(f"fused, {kind}, {layout}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainers(json.loads(sys.argv[1]))
    fused_models()
    warnings.resetwarnings()
    adapters_on_ranks.run(torch.distributed.group.WORLD)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in order
