"""What the ranks of a world take and send, as a table."""

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .shown import gigabytes, milliseconds, wrapped


def print_world(world: Mapping[str, Any], console: Console) -> None:
    """The parts, the memory, and up to where more ranks of the vocabulary pay."""
    console.print()
    ranks = f"tp {world['tp']} x cp {world['cp']} x dp {world['dp']}, {world['ranks']:,} ranks"
    wrapped(console, f"{ranks}: each {world['tokens']:,} tokens and {world['rows']:,} rows of the head")
    console.print(_table(world["parts"]), highlight=False)
    total = f"a micro-batch takes {milliseconds(world['seconds'])} ms by {world['way']}"
    chunks = f", in {world['chunks']} chunks, each sent while the next is made" if world["chunks"] > 1 else ""
    inputs, peak = (gigabytes(world[f"{name}_bytes"]) for name in ("input", "peak"))
    wrapped(console, f"{total}{chunks}; a rank holds {inputs} GB of hidden states and weight, and {peak} GB beside")
    wrapped(console, _network(world["network"]))
    wrapped(console, _pays(world))
    if world["tp"] > 1:
        whole, own = (gigabytes(world[key]) for key in ("gathered_weight_bytes", "head_bytes"))
        instead = f"to gather the weight instead, {whole} GB, is less from {world['gathered_weight_from_tokens']:,.0f}"
        wrapped(console, f"a rank sends {own} GB for it; {instead} tokens of a micro-batch on")


def _network(numbers: Mapping[str, float]) -> str:
    if not math.isfinite(numbers["link"]):
        return "network: free, all ranks are here; --machine link=, network=, latency= and the like say another"
    rates = " and ".join(f"{numbers[name] / 1e9:,.0f} GB/s" for name in ("link", "network"))
    here, away, doubling, node = (
        f"{1e6 * numbers[f'{name}latency']:g} us" for name in ("", "network_", "doubling_", "node_")
    )
    more = f"{doubling} each time the nodes double (all-reduce) or {node} for each more (all-gather)"
    return f"network: nodes of {numbers['node']:g}, {rates} in and between them; {here}, and {away} and {more}"


def _pays(world: Mapping[str, Any]) -> str:
    text = f"the vocabulary-parallel head pays up to {world['pays_up_to']} ranks: beyond, twice as many take less than"
    if not math.isfinite(world["most_ranks_in_node"]):
        return f"{text} a quarter off the time"
    near = f"{world['most_ranks_in_node']:,.0f} ranks in a node, {world['most_ranks_between']:,.0f} between nodes"
    return f"{text} a quarter off the time; the sum of hidden's gradient takes as long as the GEMMs at {near}"


def _table(parts: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part", no_wrap=True)
    table.add_column("collective", no_wrap=True)
    for name in ("ranks", "calls", "MB sent", "ms"):
        table.add_column(name, justify="right")
    for part in parts:
        sent = ["-"] * 4
        if "kind" in part:
            sent = [part["kind"], f"{part['ranks']:,}", str(part["times"]), f"{part['bytes'] / 1e6:,.2f}"]
        name = part["part"] + (", once a step" if part["once a"] == "step" else "")
        table.add_row(name, *sent, f"{1e3 * part['seconds']:,.3f}")
    return table
