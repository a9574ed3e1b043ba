"""python -m bench.ranks: the plan of a loss head on 8 to 1,024 ranks of one stated machine, into bench/results/.

A simulation by the model of `tokenrl plan`: nothing of it is measured.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tokenrl.instruments.plan.machines import changed, published
from tokenrl.instruments.plan.model import Machine, Shape
from tokenrl.instruments.plan.ways import EXCHANGE, HIDDEN_SUM
from tokenrl.instruments.plan.world import GEMMS, KERNELS, World, head_seconds, most_ranks, parts, pays_up_to, way_of

from .report import markdown_table, number

RESULT = Path(__file__).parent / "results" / "ranks.json"
# An H100, at what its GEMMs reach in training; nodes of 8.
STATED = {"flops": 600e12, "link": 350e9, "network": 45e9, "latency": 20e-6, "network_latency": 40e-6, "launch": 5e-6}
TOKENS, HIDDEN, SHOWN = 32768, 4096, 151936
VOCABULARIES = (32000, 128256, SHOWN, 262144)
RANKS = tuple(2**k for k in range(11))
TP, STEP = 8, 10.0  # of the world that grows by data-parallel ranks; seconds of its optimizer step
SUMS = {"fp32": 4, "bf16": 2}  # bytes of a number of hidden's gradient as it is summed
WEIGHTS, METRICS = "global_weights", "metrics"


def stated() -> Machine:
    return changed(published("h100-sxm", torch.bfloat16), STATED)


def simulated() -> dict[str, Any]:
    """heads: one micro-batch, whose vocabulary ever more ranks share. vocabularies: where that stops paying. worlds:
    tensor-parallel nodes, ever more of them."""
    machine = stated()
    batches = {vocab: Shape(TOKENS, HIDDEN, vocab, torch.bfloat16) for vocab in VOCABULARIES}
    last = {vocab: pays_up_to(batch, machine) for vocab, batch in batches.items()}
    return {
        "machine": machine.source, "tokens": TOKENS, "hidden": HIDDEN,
        "heads": [
            _head(batches[vocab], ranks, machine, ranks <= last[vocab]) for vocab in VOCABULARIES for ranks in RANKS
        ],
        "vocabularies": [_vocabulary(batches[vocab], last[vocab], machine) for vocab in VOCABULARIES],
        "worlds": [_world(batches[SHOWN], ranks, machine) for ranks in RANKS if ranks >= TP],
    }  # fmt: skip


def _head(batch: Shape, ranks: int, machine: Machine, pays: bool) -> dict[str, Any]:
    shape, world = replace(batch, shards=ranks), World(tp=ranks)
    seconds = {part["part"]: part["seconds"] for part in parts(batch, world, machine)}
    peak = way_of(shape, world, machine.device, None).peaks[1]
    names = {"gemms": GEMMS, "kernels": KERNELS, "exchange": EXCHANGE, "hidden_sum": HIDDEN_SUM}
    return {
        "vocab": batch.vocab, "ranks": ranks, "rows": shape.columns, "bytes": shape.inputs + peak, "pays": pays,
        "seconds": head_seconds(shape, machine), **{key: seconds.get(name, 0.0) for key, name in names.items()},
    }  # fmt: skip


def _vocabulary(batch: Shape, last: int, machine: Machine) -> dict[str, Any]:
    network, flops = machine.network, machine.gemms["logits"]
    most = {
        f"{where} {name}": most_ranks(batch.vocab, flops, bandwidth, size)
        for where, bandwidth in (("node", network.link), ("between", network.network))
        for name, size in SUMS.items()
    }
    return {"vocab": batch.vocab, "pays_up_to": last, "most_ranks": most}


def _world(batch: Shape, ranks: int, machine: Machine) -> dict[str, Any]:
    world = World(tp=TP, dp=ranks // TP)
    found = {part["part"]: part for part in parts(batch, world, machine)}
    once = {name: found[name]["seconds"] if name in found else 0.0 for name in (WEIGHTS, METRICS)}
    return {
        "ranks": ranks, "dp": world.dp, "seconds": head_seconds(world.shape(batch), machine),
        "head_bytes": sum(found[name]["bytes"] for name in (EXCHANGE, HIDDEN_SUM)), **once,
    }  # fmt: skip


def heads_table(found: dict[str, Any]) -> str:
    shown = [x for x in found["heads"] if x["vocab"] == SHOWN]
    rows = []
    for x in shown:
        times = (number(1e3 * x[key]) for key in ("gemms", "kernels", "exchange", "hidden_sum", "seconds"))
        share = f"{shown[0]['seconds'] / x['seconds'] / x['ranks']:.0%}"
        pays = "yes" if x["pays"] else "no"
        rows.append([f"{x['ranks']:,}", f"{x['rows']:,}", number(x["bytes"] / 1e9), *times, share, pays])
    head = ["ranks", "rows", "GB a rank", "GEMMs ms", "kernels ms", "exchange ms", "hidden's sum ms", "head ms"]
    return markdown_table([*head, "of ideal", "pays"], rows)


def vocabularies_table(found: dict[str, Any]) -> str:
    rows = [
        [f"{x['vocab']:,}", str(x["pays_up_to"]), *(f"{ranks:.0f}" for ranks in x["most_ranks"].values())]
        for x in found["vocabularies"]
    ]
    head = ["vocabulary", "pays up to", *(f"{name} sums" for name in found["vocabularies"][0]["most_ranks"])]
    return markdown_table(head, rows)


def worlds_table(found: dict[str, Any]) -> str:
    rows = [
        [
            f"{x['ranks']:,}", f"{TP} x {x['dp']}", number(1e3 * x["seconds"]), number(x["head_bytes"] / 1e6),
            number(1e6 * x[WEIGHTS]), number(1e6 * x[METRICS]), f"{(x[WEIGHTS] + x[METRICS]) / STEP:.4%}",
        ]
        for x in found["worlds"]
    ]  # fmt: skip
    head = ["ranks", "tp x dp", "head ms", "MB sent a micro-batch", "global_weights us", "metrics us"]
    return markdown_table([*head, f"of a {STEP:.0f} s step"], rows)


if __name__ == "__main__":
    RESULT.write_text(json.dumps(simulated(), indent=1) + "\n")
