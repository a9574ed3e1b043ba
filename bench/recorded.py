"""The loss head of a recorded batch, forward and backward: every way that is held by the tolerance rule, in turns."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenrl.instruments.parity.comparison import compared
from tokenrl.instruments.parity.computation import Outcome, with_leaves
from tokenrl.instruments.parity.held import Held, leaves_of
from tokenrl.instruments.parity.own_backends import on
from tokenrl.instruments.progress import tracked
from tokenrl.instruments.record import first
from tokenrl.instruments.rollout_batch import RolloutBatch
from tokenrl.objectives.policy import Objective

from .competitors import first_line
from .measure import paired_samples, peak_memory
from .recorded_ways import Way, ways
from .run import default_backends

HELD_LOGITS = 1 << 24  # of the sequences that are held to the rule, if one alone is not larger
MOST_LOGITS = 1 << 27  # of one sequence: each fp64 copy of them takes 1 GB


@dataclass
class Beside:
    """lines: of each way that was timed, the fastest of ours first. fastest: the call of that one. remarks: (way, why
    it was not). wrong: ways of ours that are not held by the rule."""

    fastest: Callable[[], object] | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def few(batch: RolloutBatch) -> RolloutBatch | None:
    """As many of its first sequences as are held to the rule; None where one alone is too large."""
    if batch.leaf == "logp":
        return batch
    columns = batch.tensors["logits"].shape[-1] if batch.leaf == "logits" else batch.tensors["weight"].shape[0]
    ends = batch.layout.cu_seqlens.tolist()
    count = sum(end * columns <= HELD_LOGITS for end in ends[1:])
    if count == 0 and len(ends) > 1 and ends[1] * columns > MOST_LOGITS:
        return None
    return first(batch, max(count, 1)) if len(ends) > 1 else batch


def held_batch(batch: RolloutBatch, row: Objective) -> Held | None:
    """What each way is held to: a few sequences, without the tokens that rounding decides."""
    some = few(batch.under(row))
    if some is None:
        return None
    held = Held(some.to("cpu"), leaves_of(some), eager=True)
    return held.without(held.undecided(None).tokens)


def outcome(way: Way, batch: RolloutBatch, row: Objective) -> Outcome:
    names = leaves_of(batch)
    batch = with_leaves(batch, names)
    leaves = [batch.tensors[name] for name in names]
    loss = way.make(batch, row)(*leaves)
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return Outcome(loss.detach().cpu(), {name: x.cpu() for name, x in zip(names, found, strict=True)})


def why_not_held(way: Way, held: Held, row: Objective, device: str) -> tuple[str | None, float]:
    """(why it may not be timed, or None; its largest error over what is allowed)."""
    found = compared(way.name, device, outcome(way, held.batch.to(device), row), held, None)
    worst = max(found.errors, key=lambda error: error.share if error.share == error.share else math.inf)
    if found.held:
        return None, worst.share
    return (
        f"not within the tolerance rule: {worst.of}, {worst.norm} error {worst.error:.1e}, allowed {worst.allowed:.1e}",
        worst.share,
    )


def call_of(way: Way, batch: RolloutBatch, row: Objective) -> Callable[[], object]:
    names = leaves_of(batch)
    batch = with_leaves(batch, names)
    leaves = [batch.tensors[name] for name in names]
    loss = way.make(batch, row)

    def call() -> object:
        return torch.autograd.grad(loss(*leaves), leaves, allow_unused=True, materialize_grads=True)

    return call


def right_ways(
    batch: RolloutBatch, row: Objective, every: Sequence[Way], device: str, found: Beside
) -> dict[str, dict[str, Any]]:
    """By name: the ways that are held by the rule, with their calls and shares of the allowed error."""
    (held,) = (held_batch(batch, row) for _ in tracked(["the fp64 reference"]))
    if held is None:
        found.remarks.append(("all", "held to no rule: in fp64 the logits of the first sequence alone would not fit"))
    ready: dict[str, dict] = {}
    for way in tracked(every, lambda way: way.name):
        reason, share = way.reason, None
        if reason is None:
            try:
                if held is not None:
                    reason, share = why_not_held(way, held, row, device)
                call = call_of(way, batch, row)
                call()  # compiles, and shows whether all of it fits
            except Exception as error:  # whatever stops a way is the reason
                reason = first_line(error)
            if reason and way.ours:
                found.wrong.append(way.name)
        if reason:
            found.remarks.append((way.name, reason))
        else:
            ready[way.name] = {"name": way.name, "ours": way.ours, "error_share": share, "call": call}
    return ready


def beside(
    batch: RolloutBatch, row: Objective, device: str, backends: Sequence[str] = (), *, compile: bool = True,
    repeats: int = 7,
) -> Beside:  # fmt: skip
    """Medians of repeats, taken in turns."""
    batch, row, found = batch.to(device), on(row, torch.device(device)), Beside()
    names = list(backends) or default_backends(torch.device(device))
    ready = right_ways(batch, row, ways(batch, row, names, compile), device, found)
    calls = {name: one.pop("call") for name, one in ready.items()}
    rivals = frozenset(name for name, one in ready.items() if not one["ours"])
    taken = paired_samples(calls, device, repeats, rivals, lambda turns: tracked(turns, lambda i: f"turn {i + 1}"))
    for name, one in tracked(ready.items(), lambda item: f"memory of {item[0]}"):
        one |= {"seconds": statistics.median(taken[name]), "samples": len(taken[name])}
        one["peak_bytes"] = peak_memory(calls[name], device)
    found.lines = sorted(ready.values(), key=lambda one: (not one["ours"], one["seconds"]))
    if found.lines and found.lines[0]["ours"]:
        best = found.lines[0]
        found.fastest = calls[best["name"]]
        for one in found.lines:
            one["times_ours"] = one["seconds"] / best["seconds"]
    return found
