"""What test_across_ranks.py runs on four processes of gloo, forked from one that has imported all.

    python rank_process.py FILE

The first two, three and four of them are a world each. Prints "HELD <world> <name>" on rank 0 for what all its ranks
found.
"""

import datetime
import os
import sys
import traceback

import context_cases
import data_cases
import example_cases
import graph_rank_cases
import preference_rank_cases
import statistics_cases
import torch
import torch.distributed as dist
import vocab_cases
import vocab_divergence_cases
import vocab_linear_cases
import vocab_policy_cases

WORLDS = (2, 3, 4)
MODULES = (
    vocab_cases, vocab_linear_cases, vocab_policy_cases, context_cases, data_cases, vocab_divergence_cases,
    preference_rank_cases, statistics_cases, example_cases,
    graph_rank_cases,
)  # fmt: skip
EVERY = {name: case for module in MODULES for name, case in module.CASES.items()}
# What needs no more ranks than two, or no four: which run is the same to the exchange.
ON_TWO = ("reference", "triton", "sim", "one_graph", "their_contract", "float32", "bfloat16", "fsdp2", "example")
NOT_ON_FOUR = ("preference, ", "divergence, ", "statistics, ")


def of_world(world: int) -> dict:
    """All of them on two ranks; on more one dtype and the CPU's kernels."""
    left_out = {2: (), 3: ON_TWO, 4: (*ON_TWO, *NOT_ON_FOUR)}[world]
    return {name: case for name, case in EVERY.items() if not any(part in name for part in left_out)}


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


def run_rank(store: str, rank: int) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(minutes=15)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(WORLDS), timeout=wait)
    groups = {world: dist.new_group([*range(world)], timeout=wait) for world in WORLDS}
    for world, group in groups.items():
        if rank < world:
            run(world, group)
    dist.barrier()


def forked(store: str, rank: int) -> int:
    """The process of a rank."""
    if process := os.fork():
        return process
    code = 1
    try:
        run_rank(store, rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads may abort a process that ends in order


def main(store: str) -> int:
    """How many ranks failed; the others end when one does."""
    ranks = [forked(store, rank) for rank in range(max(WORLDS))]
    return sum(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) != 0 for rank in ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
