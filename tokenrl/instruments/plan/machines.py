"""The machines of a plan: a GPU of the table by its published limits, or this one by measured ones."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ...errors import unknown
from .. import machine_limits
from ..machine import machine_name
from ..machine_limits import Limits
from ..progress import tracked
from .gpus import GPUS
from .model import Machine, Shape

# Of the published limits, what copies and GEMMs reached on an H200: 4.3 of 4.8 TB/s, 790 of 989 TFLOP/s.
REACHED_BANDWIDTH, REACHED_GEMMS = 0.9, 0.8
LAUNCH = 5e-6
HERE = {"cpu": "cpu", "cuda": "cuda"}  # this machine's
FORMS = ("logits", "hidden", "weight")


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
    return Machine(gpu.title, "cuda", limits, dict.fromkeys(FORMS, rate), LAUNCH, gpu.memory, gpu.link, source)


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
    return Machine(title, device, limits, found["GEMMs"], found["launches"], memory, math.inf, source)
