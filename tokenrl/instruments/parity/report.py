"""What `tokenrl parity` and assert_parity found of a batch."""

from dataclasses import dataclass, replace

import torch

from ...objectives.policy import Objective, find_objective
from ...ops.backends import BACKENDS
from ..progress import tracked
from ..rollout_batch import RolloutBatch
from .comparison import Comparison, Held, Token, compared, leaves_of, precisions
from .diagnosis import diagnosed
from .own_backends import named, ways, without
from .user_loss import UserLoss

NAMED = 8  # of the tokens at clip edges


@dataclass(frozen=True)
class Report:
    """objective: the row's name. leaves: what gradients are taken by. undecided: how many tokens were left out since
    rounding decides their gradient; edges: the first of them. mistakes: usual ones whose numbers are those of a wrong
    loss; None where none was looked for."""

    objective: str
    sequences: int
    cells: int
    valid: int
    leaves: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    undecided: int
    edges: tuple[Token, ...]
    mistakes: tuple[str, ...] | None = None

    @property
    def held(self) -> bool:
        """Something ran, and all that ran is within the tolerance rule."""
        ran = [comparison for comparison in self.comparisons if comparison.reason is None]
        return bool(ran) and all(comparison.held for comparison in ran)


def _report(held: Held, comparisons: list[Comparison], undecided: torch.Tensor) -> Report:
    layout = held.batch.layout
    cells = undecided.flatten().nonzero().flatten().tolist()
    edges = tuple(held.described(cell) for cell in cells[:NAMED])
    return Report(
        held.row.name, layout.num_sequences, layout.num_tokens, int(layout.valid().sum()), held.leaves,
        tuple(comparisons), len(cells), edges,
    )  # fmt: skip


def of_backends(batch: RolloutBatch, objective: str | Objective | None = None, backend: str | None = None) -> Report:
    """Every backend that can run here, or one, in fp32 and in the batch's own precision."""
    row, leaves = batch.objective if objective is None else find_objective(objective), leaves_of(batch)
    at_edges = Held(batch, row, leaves).undecided().tokens
    held = Held(without(batch, at_edges), row, leaves)
    chosen = ways(held, tuple(BACKENDS)) if backend is None else named(held, backend)
    return _report(held, [way.compared(held) for way in tracked(chosen)], at_edges)


def of_loss(loss: UserLoss, batch: RolloutBatch, objective: str | Objective | None = None) -> Report:
    """A user's loss, in fp32 and in the batch's own precision."""
    row = batch.objective if objective is None else find_objective(objective)
    loss.check_names(row)
    batch = loss.leaf_batch(batch)
    held = Held(batch, row, loss.leaves(batch))
    but, dtypes = held.undecided(), precisions(batch)
    found = [loss.outcome(held.given(dtype), row) for dtype in dtypes]
    pairs = zip(found, dtypes, strict=True)
    comparisons = [compared(loss.name, "cpu", outcome, held, dtype, but) for outcome, dtype in pairs]
    report = _report(held, comparisons, but.tokens)
    if report.held:
        return report
    wrong_in = next(dtype for dtype, one in zip(dtypes, comparisons, strict=True) if not one.held)
    named = {one.name: str(one) for one in reversed(diagnosed(loss, batch, row, wrong_in))}
    return replace(report, mistakes=tuple(reversed(named.values())))
