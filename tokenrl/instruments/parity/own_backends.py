"""The backends of this machine, each on each device where it can run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ...batch.checks import check_name
from ...errors import wrong
from ...objectives.policy import Objective
from ...ops.backends import BACKENDS, Backend
from ..rollout_batch import RolloutBatch, mapped_objective
from .comparison import Comparison, compared, precisions
from .computation import Outcome, drawing_alike, with_leaves
from .held import Dtype, Held


@dataclass(frozen=True)
class Way:
    """A backend on a device in a precision, None: the batch's own; or the reason why it cannot run."""

    backend: str
    device: torch.device
    dtype: Dtype = torch.float32
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}"

    def compared(self, held: Held, undecided: int) -> Comparison:
        """held: without the tokens that rounding decides."""
        if self.reason is not None:
            return Comparison(self.backend, reason=self.reason)
        found = backend_outcome(held.given(self.dtype), held.leaves, self.backend, self.device)
        return replace(compared(self.backend, self.device.type, found, held, self.dtype), undecided=undecided)


def ways(held: Held, names: tuple[str, ...]) -> Iterator[Way]:
    for name in names:
        found = places(BACKENDS[name], held.row.gate.name)
        for device in (device for device, reason in found.items() if reason is None):
            yield from (Way(name, device, dtype) for dtype in precisions(held.batch))
        device, reason = list(found.items())[-1]
        if all(found.values()):
            yield Way(name, device, reason=reason)


def named(held: Held, name: str) -> Iterator[Way]:
    """One backend, which must be able to run."""
    check_name("backend", name, BACKENDS)
    found = list(ways(held, (name,)))
    if reason := found[-1].reason:
        able = dict.fromkeys(way.backend for way in ways(held, tuple(BACKENDS)) if way.reason is None)
        raise wrong("backend", repr(name), f"{', '.join(able)} ({name}: {reason})")
    yield from found


def places(backend: Backend, gate: str) -> dict[torch.device, str | None]:
    """The devices of this machine, with the reason why a backend cannot run there."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    devices = [torch.device(kind) for kind in kinds]
    return {device: backend.why_not(device) or backend.why_not_gate(gate) for device in devices}


def on(row: Objective, device: torch.device) -> Objective:
    """The row with its tensors on a device."""
    return mapped_objective(row, lambda _, bound: bound.to(device))


def backend_outcome(batch: RolloutBatch, leaves: tuple[str, ...], backend: str, device: torch.device) -> Outcome:
    """On the CPU again, in the batch's precision."""
    batch = with_leaves(batch.to(device), leaves)
    with drawing_alike():
        loss, _ = batch.loss(backend=backend)
    given = [batch.tensors[name] for name in leaves]
    found = torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)
    return Outcome(loss.detach().cpu(), {name: x.cpu() for name, x in zip(leaves, found, strict=True)})
