"""What is found of a loss against what the reference gives, in fp64 and in the precision of what is found."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rollout_batch import FIXED, RolloutBatch
from .computation import HEADS, Outcome
from .held import Dtype, Held
from .noise import Undecided
from .tolerance import Tally, odd_ones, sum_errors


@dataclass(frozen=True)
class Error:
    """of: "loss", or a tensor by which there is a gradient. norm: the one that comes nearest to what is allowed."""

    of: str
    norm: str
    error: float
    allowed: float

    @property
    def held(self) -> bool:
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """Of what is allowed; infinite of an error that is no number."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed > 0 and self.error == self.error else float("inf")


@dataclass(frozen=True)
class Token:
    """Where a token is, and what the objective sees of it. position: from 1, among the `length` valid tokens of its
    sequence. to_edge: by how much its log ratio must move to the nearest clip edge, None where there is none."""

    sequence: int
    position: int
    length: int
    ratio: float
    advantage: float
    to_edge: float | None


@dataclass(frozen=True)
class Comparison:
    """One way to compute a loss. reason: why it cannot run. not_compared: tensors whose gradient holds tokens that
    rounding decides. undecided: how many these are."""

    way: str
    device: str = ""
    dtype: str = ""
    errors: tuple[Error, ...] = ()
    worst: Token | None = None
    reason: str | None = None
    not_compared: tuple[str, ...] = ()
    undecided: int = 0

    @property
    def held(self) -> bool:
        return all(error.held for error in self.errors)


@dataclass(frozen=True)
class Errors:
    """Of the value and of each gradient; the gradients that are not compared; the cell of the token that errs most."""

    found: tuple[Error, ...]
    not_compared: tuple[str, ...]
    worst: int | None

    @property
    def held(self) -> bool:
        return all(error.held for error in self.found)


def held_to(found: Outcome, held: Held, dtype: Dtype, but: Undecided | None = None) -> Errors:
    """What was found in a precision, against the reference. but: tokens whose gradient is left out."""
    truth, base = held.truth, held.base(dtype)
    ((_, error, allowed),) = sum_errors(found.value, truth.terms, base.terms)
    if odd_ones(found.value, truth.value):
        error = float("inf")
    some = but is not None and but.count > 0
    left_out = tuple(name for name in found.gradients if some and name in FIXED)
    tallies = {name: Tally() for name in found.gradients if name not in left_out}
    worst: tuple[float, int | None] = (0.0, None)
    for (at, exact), (_, near) in zip(held.rows(truth, torch.float64), held.rows(base, dtype), strict=True):
        for name in exact.keys() & tallies.keys():
            three = [_flat(name, found.gradients[name], at), exact[name], near[name]]
            if but is not None and name not in FIXED:
                kept = ~but.tokens.flatten()[at]
                three = [torch.where(kept.view(-1, *(1,) * (x.dim() - 1)), x, 0) for x in three]
            tallies[name].add(*three)
            if name not in FIXED:
                worst = max(worst, _farthest(three[0], three[1], at.start or 0), key=lambda pair: pair[0])
    rows = [Error("loss", "L1", error, allowed + (but.jump if but else 0.0))]
    rows += [_worst_norm(name, tally) for name, tally in tallies.items()]
    return Errors(tuple(rows), left_out, worst[1])


def _flat(name: str, gradient: Tensor, at: slice) -> Tensor:
    """The rows of some tokens."""
    if name in FIXED:
        return gradient
    return (gradient.flatten(0, -2) if name in HEADS else gradient.flatten())[at]


def _worst_norm(name: str, tally: Tally) -> Error:
    if tally.odd:
        return Error(name, f"{tally.odd} not finite", float("inf"), 0.0)
    return max((Error(name, *norm) for norm in tally.errors()), key=lambda error: error.share)


def _farthest(found: Tensor, truth: Tensor, begin: int) -> tuple[float, int | None]:
    """(by how much the token errs that errs most, its cell; None where none does)"""
    apart = (found.double() - truth).abs().nan_to_num(nan=torch.inf)
    apart = apart.amax(-1) if apart.dim() > 1 and apart.numel() else apart.flatten()
    if not apart.numel() or not apart.max() > 0:
        return 0.0, None
    return apart.max().item(), begin + int(apart.argmax())


def described(held: Held, cell: int) -> Token:
    layout, known = held.batch.layout, held.truth.seen
    sequence, valid = int(layout.rows()[cell]), layout.valid()
    start, end = layout.cu_seqlens[sequence : sequence + 2].tolist()
    return Token(
        sequence, int(valid[start : cell + 1].sum()), int(valid[start:end].sum()), known.s[cell].exp().item(),
        known.advantages[cell].item(), known.distance(cell),
    )  # fmt: skip


def precisions(batch: RolloutBatch) -> list[Dtype]:
    """fp32, and the batch's own where that is another."""
    return [torch.float32] if batch.tensors[batch.leaf].dtype == torch.float32 else [torch.float32, None]


def compared(
    way: str, device: str, found: Outcome, held: Held, dtype: Dtype, but: Undecided | None = None
) -> Comparison:
    """What was found in a precision, against the reference."""
    errors = held_to(found, held, dtype, but)
    worst = None if errors.worst is None else described(held, errors.worst)
    precision = str(found.gradients[held.leaves[0]].dtype).removeprefix("torch.")
    count = 0 if but is None else but.count
    return Comparison(way, device, precision, errors.found, worst, None, errors.not_compared, count)
