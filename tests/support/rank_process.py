"""What test_across_ranks.py runs in each of four processes on gloo: python rank_process.py FILE RANK.

The first two, three and four of them are a world each. Prints "HELD <world> <name>" on rank 0 for what all its ranks
found.
"""

import datetime
import os
import sys

import context_cases
import data_cases
import torch
import torch.distributed as dist
import vocab_cases
import vocab_linear_cases
import vocab_policy_cases

WORLDS = (2, 3, 4)


def of_world(world: int) -> dict:
    """All of them on two ranks; on more one dtype and the CPU's kernels, as which run is the same to the exchange."""
    every = (
        vocab_cases.CASES | vocab_linear_cases.CASES | vocab_policy_cases.CASES | context_cases.CASES | data_cases.CASES
    )
    left_out = ("reference", "triton", "sim", "one_graph", "their_contract"), ("float32", "bfloat16")
    return {
        name: case
        for name, case in every.items()
        if world == 2 or not (name.endswith(left_out[0]) or any(dtype in name for dtype in left_out[1]))
    }


def run(world: int, group: dist.ProcessGroup) -> None:
    for name, case in of_world(world).items():
        try:
            case(group)
        except BaseException:
            print(f"FAILED {world} {name} on rank {group.rank()}", flush=True)
            raise
        dist.barrier(group)
        if group.rank() == 0:
            print(f"HELD {world} {name}", flush=True)


def main(store: str, rank: int) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(minutes=15)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(WORLDS), timeout=wait)
    groups = {world: dist.new_group([*range(world)], timeout=wait) for world in WORLDS}
    for world, group in groups.items():
        if rank < world:
            run(world, group)
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
    os._exit(0)  # gloo's threads may abort a process that ends in order
