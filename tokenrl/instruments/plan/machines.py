"""The machines of a plan: a GPU of the table by its published limits, or this one by measured ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from ...errors import unknown, wrong
from .. import machine_limits
from ..machine import machine_name
from ..machine_limits import Limits
from ..progress import tracked
from .gpus import GPUS
from .model import Machine, Shape
from .network import FREE, Network

# Of the published limits, what copies and GEMMs reached on an H200: 4.3 of 4.8 TB/s, 790 of 989 TFLOP/s; and what
# collectives are taken to reach of the links of a node.
REACHED_BANDWIDTH, REACHED_GEMMS, REACHED_LINK = 0.9, 0.8, 0.78
LAUNCH = 5e-6
HERE = {"cpu": "cpu", "cuda": "cuda"}  # this machine's
FORMS = ("logits", "hidden", "weight")
OF_NETWORK = tuple(field.name for field in fields(Network))
# What --machine sets: of a GPU, then of the network.
NUMBERS = ("flops", "bandwidth", "exponentials", "memory", "launch", "walk", *OF_NETWORK)


def names() -> list[str]:
    return [*GPUS, *HERE]


def check_gpu(name: str | None) -> str:
    """The name, of this machine where there is none; ValueError, with the nearest, for one that is not in the table."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in names():
        raise unknown("gpu", name, names())
    if name == "cuda" and not torch.cuda.is_available():
        raise unknown("gpu", "cuda (torch sees none here)", [*GPUS, "cpu"])
    return name


def machine_of(name: str, shape: Shape) -> Machine:
    return measured(HERE[name], shape) if name in HERE else published(name, shape.dtype)


def published(name: str, dtype: torch.dtype) -> Machine:
    """A GPU of the table, at the shares of its limits that were reached."""
    gpu = GPUS[name]
    rate = REACHED_GEMMS * (gpu.half if dtype.itemsize == 2 else gpu.single)
    bandwidth = REACHED_BANDWIDTH * gpu.bandwidth
    source = f"{gpu.source}; {REACHED_GEMMS:.0%} of its flops and {REACHED_BANDWIDTH:.0%} of its bandwidth"
    limits = Limits(bandwidth, bandwidth, gpu.exponentials, source)
    network = Network(link=REACHED_LINK * gpu.link)
    return Machine(gpu.title, "cuda", limits, dict.fromkeys(FORMS, rate), LAUNCH, gpu.memory, network, source)


def measured(device: str, shape: Shape) -> Machine:
    """This machine, by what it does at best. Shards are all here, so that what they send is free."""
    measures: dict[str, Callable[[], Any]] = {
        "bandwidth": lambda: machine_limits.limits(device, min(shape.logits * shape.size, 1 << 29)),
        "GEMMs": lambda: machine_limits.products(device, shape.dtype, shape.tokens, shape.hidden, shape.columns),
        "launches": lambda: machine_limits.launch(device),
    }
    found = {name: measures[name]() for name in tracked(measures, lambda name: f"measuring {name}")}
    limits = found["bandwidth"]
    title, memory = machine_name(device), None
    if device == "cuda":
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        title += f", {torch.get_num_threads()} threads"
    source = f"measured: {limits.source}, torch.mm"
    return Machine(title, device, limits, found["GEMMs"], found["launches"], memory, FREE, source)


def numbers_of(given: Sequence[str]) -> dict[str, float]:
    """Of NAME=NUMBER each, in flops, bytes and seconds; ValueError, with the nearest, for others."""
    found = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in NUMBERS:
            raise unknown("machine", name, NUMBERS)
        try:
            found[name] = float(number)
        except ValueError:
            raise wrong(f"machine {name}", number, f"{name}=NUMBER, in flops/s, bytes, bytes/s or seconds") from None
        least = 1 if name == "node" else 0
        free = name == "walk" or name.endswith(("latency", "launch"))
        if not (found[name] >= least if free or least else found[name] > 0):
            raise wrong(f"machine {name}", number, "at least 1 rank" if least else "0 or more" if free else "above 0")
    return found


def changed(machine: Machine, numbers: Mapping[str, float]) -> Machine:
    """The machine with these of its numbers."""
    if not numbers:
        return machine
    limits, gemms = machine.limits, machine.gemms
    if "bandwidth" in numbers:
        limits = replace(limits, read=numbers["bandwidth"], copy=numbers["bandwidth"])
    if "exponentials" in numbers:
        limits = replace(limits, exponentials=numbers["exponentials"])
    if "flops" in numbers:
        gemms = dict.fromkeys(FORMS, numbers["flops"])
    own: dict[str, Any] = {name: numbers[name] for name in ("memory", "launch", "walk") if name in numbers}
    network: dict[str, Any] = {name: numbers[name] for name in OF_NETWORK if name in numbers}
    own |= {"limits": limits, "gemms": gemms, "network": replace(machine.network, **network)}
    source = f"{machine.source}; given: {', '.join(f'{name} {x:g}' for name, x in numbers.items())}"
    return replace(machine, source=source, **own)
