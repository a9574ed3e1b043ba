"""What is found of a loss against what the reference gives, in fp64 and in the precision of what is found."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...objectives.policy import Objective
from ..rollout_batch import FIXED, RolloutBatch
from .around import Seen
from .computation import HEADS, Change, Computation, Outcome, Undecided, as_it_is, outcome, seen, undecided
from .tolerance import errors, odd_ones, sum_errors


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
    rounding decides."""

    way: str
    device: str = ""
    dtype: str = ""
    errors: tuple[Error, ...] = ()
    worst: Token | None = None
    reason: str | None = None
    not_compared: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        return all(error.held for error in self.errors)


def held_to(
    found: Outcome, truth: Outcome, base: Outcome, but: Undecided | None = None
) -> tuple[tuple[Error, ...], tuple[str, ...]]:
    """(errors of the value and of each gradient; the gradients that are not compared). but: tokens whose gradient is
    left out."""
    assert truth.terms is not None and base.terms is not None
    ((_, error, allowed),) = sum_errors(found.value, truth.terms, base.terms)
    if odd_ones(found.value, truth.value):
        error = float("inf")
    rows, left_out = [Error("loss", "L1", error, allowed + (but.jump if but else 0.0))], []
    for name, gradient in found.gradients.items():
        three = (gradient, truth.gradients[name], base.gradients[name])
        if but is not None and but.count:
            if name in FIXED:
                left_out.append(name)
                continue
            three = tuple(x[~but.tokens] for x in three)  # type: ignore[assignment]
        rows.append(_worst_norm(name, *three))
    return tuple(rows), tuple(left_out)


def _worst_norm(name: str, found: Tensor, truth: Tensor, base: Tensor) -> Error:
    if odd := odd_ones(found, truth):
        return Error(name, f"{odd} not finite", float("inf"), 0.0)
    finite = truth.isfinite()
    by_norm = errors(*(x[finite] for x in (found, truth, base)))
    return max((Error(name, *norm) for norm in by_norm), key=lambda error: error.share)


def worst_cell(found: Outcome, truth: Outcome, but: Undecided | None = None) -> int | None:
    """The cell of the token whose gradient errs most; None where none does."""
    for name, gradient in found.gradients.items():
        if name in FIXED:
            continue
        apart = (gradient.double() - truth.gradients[name]).abs().nan_to_num(nan=torch.inf)
        apart = apart.amax(-1) if name in HEADS and apart.numel() else apart
        if but is not None:
            apart = torch.where(but.tokens, 0, apart)
        if apart.numel() and apart.max() > 0:
            return int(apart.argmax())
    return None


class Held:
    """A batch and its row on the reference, in fp64 and in the precisions that are tested, each computed once."""

    def __init__(self, batch: RolloutBatch, row: Objective, leaves: tuple[str, ...], change: Change = as_it_is):
        self.batch, self.row, self.leaves, self.change = batch, row, leaves, change
        self._known: dict[str, Outcome] = {}

    def given(self, dtype: torch.dtype | None) -> RolloutBatch:
        """The batch in a precision; None: in its own."""
        return self.batch if dtype is None else self.batch.cast(dtype)

    def outcome(self, dtype: torch.dtype | None) -> Outcome:
        if str(dtype) not in self._known:
            self._known[str(dtype)] = outcome(self.given(dtype), self.row, self.leaves, self.change)
        return self._known[str(dtype)]

    def start(self) -> Computation:
        """In fp64, without a graph, and without a KL whose coefficient is 0."""
        batch = self.given(torch.float64)
        start = Computation(batch, self.row, *batch.scored("reference"))
        return start if batch.settings.get("kl_coef") else start.changed(ref_logp=None)

    @property
    def truth(self) -> Outcome:
        return self.outcome(torch.float64)

    def undecided(self) -> Undecided:
        return undecided(self.batch.cast(torch.float64), self.row, self.change)

    @cached_property
    def _seen(self) -> Seen:
        return seen(self.batch.cast(torch.float64), self.row)

    def described(self, cell: int) -> Token:
        layout, known = self.batch.layout, self._seen
        sequence, valid = int(layout.rows()[cell]), layout.valid()
        start, end = layout.cu_seqlens[sequence : sequence + 2].tolist()
        return Token(
            sequence, int(valid[start : cell + 1].sum()), int(valid[start:end].sum()), known.s[cell].exp().item(),
            known.advantages[cell].item(), known.distance(cell),
        )  # fmt: skip


def leaves_of(batch: RolloutBatch) -> tuple[str, ...]:
    """What gradients are taken by: logits, hidden states with the head, or log-probs."""
    return tuple(name for name in HEADS if name in batch.tensors) or ("logp",)


def precisions(batch: RolloutBatch) -> list[torch.dtype | None]:
    """fp32, and the batch's own where that is another."""
    return [torch.float32] if batch.tensors[batch.leaf].dtype == torch.float32 else [torch.float32, None]


def compared(
    way: str, device: str, found: Outcome, held: Held, dtype: torch.dtype | None, but: Undecided | None = None
) -> Comparison:
    """What was found in a precision, against the reference."""
    rows, left_out = held_to(found, held.truth, held.outcome(dtype), but)
    cell = worst_cell(found, held.truth, but)
    worst = None if cell is None else held.described(cell)
    precision = str(found.gradients[held.leaves[0]].dtype).removeprefix("torch.")
    return Comparison(way, device, precision, rows, worst, not_compared=left_out)
