"""What machine this is, in words."""

import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .._versions import installed
from .machine_limits import limits
from .progress import tracked
from .remedies import build_info

CPUINFO = Path("/proc/cpuinfo")


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.+)", CPUINFO.read_text()) if CPUINFO.exists() else None
    return found[1].strip() if found else platform.machine()


def bf16_instructions() -> str:
    """Which of the instructions that GEMMs in bf16 want an x86 CPU has; nothing of another one."""
    flags = re.search(r"flags\s*: (.+)", CPUINFO.read_text()) if CPUINFO.exists() else None
    if flags is None:
        return ""
    there = {name: name in flags[1].split() for name in ("amx_bf16", "avx512_bf16")}
    return ", ".join(name if has else f"no {name}" for name, has in there.items())


@cache
def described_machine(device: str) -> dict[str, Any]:
    """What it is and, in bytes and exponentials per second, what it does at best."""
    (found,) = (limits(device) for _ in tracked(["this machine's limits"]))
    own: dict[str, Any] = {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    if device == "cpu":
        own = {"instruction_set": build_info().get("instruction_set", "none: not built"), "bf16": bf16_instructions()}
        own["threads"] = torch.get_num_threads()
    return {
        "name": machine_name(device), "device": device, **own, "python": platform.python_version(),
        "torch": torch.__version__, "tokenrl": installed("tokenrl"), "read": found.read, "copy": found.copy,
        "exponentials": found.exponentials, "measured_by": found.source,
    }  # fmt: skip


def machine_words(device: str) -> str:
    """The same in two lines."""
    found = described_machine(device)
    kind = f"{found['threads']} threads, {found['instruction_set']}, {found['bf16']}" if device == "cpu" else "CUDA"
    rates = (
        f"read {found['read'] / 1e9:.1f}, copy {found['copy'] / 1e9:.1f} GB/s, {found['exponentials'] / 1e9:.2f} Gexp/s"
    )
    return f"{found['name']}, {kind.rstrip(', ')}\ntorch {found['torch']}; at best {rates}"
