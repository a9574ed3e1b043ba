"""What `tokenrl parity` and assert_parity found of a batch."""

from dataclasses import dataclass, replace

import torch

from ...objectives.policy import Objective
from ...ops.backends import BACKENDS
from ..progress import tracked
from ..rollout_batch import RolloutBatch
from .comparison import Comparison, Token, compared, described, precisions
from .diagnosis import diagnosed
from .held import Held, leaves_of
from .own_backends import named, ways
from .user_loss import UserLoss

NAMED = 8  # of the tokens at clip edges


@dataclass(frozen=True)
class Report:
    """objective: the row's name. leaves: what gradients are taken by. undecided: how many tokens were left out in
    fp32, since rounding decides their gradient; edges: the first of them. mistakes: usual ones whose numbers are those
    of a wrong loss; None where none was looked for."""

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
    edges = tuple(described(held, cell) for cell in cells[:NAMED])
    return Report(
        held.row.name, layout.num_sequences, layout.num_tokens, int(layout.valid().sum()), held.leaves,
        tuple(comparisons), len(cells), edges,
    )  # fmt: skip


def of_backends(batch: RolloutBatch, objective: str | Objective | None = None, backend: str | None = None) -> Report:
    """Every backend that can run here, or one, in fp32 and in the batch's own precision."""
    batch = batch.under(objective)
    held, dtypes = Held(batch, leaves_of(batch)), precisions(batch)
    but = {dtype: held.undecided(dtype) for dtype in dtypes}
    left = {dtype: held.without(but[dtype].tokens) for dtype in dtypes}
    chosen = ways(held, tuple(BACKENDS)) if backend is None else named(held, backend)
    found = [way.compared(left[way.dtype], but[way.dtype].count) for way in tracked(chosen)]
    return _report(held, found, but[torch.float32].tokens)


def of_loss(loss: UserLoss, batch: RolloutBatch, objective: str | Objective | None = None) -> Report:
    """A user's loss, in fp32 and in the batch's own precision."""
    batch = batch.under(objective)
    loss.check_names(batch.objective)
    batch = loss.leaf_batch(batch)
    held, dtypes = Held(batch, loss.leaves(batch), eager=True), precisions(batch)
    comparisons, found = [], None
    for dtype in dtypes:
        found = loss.outcome(held.given(dtype))
        comparisons.append(compared(loss.name, "cpu", found, held, dtype, held.undecided(dtype)))
    report = _report(held, comparisons, held.undecided(torch.float32).tokens)
    if report.held:
        return report
    wrong_in = next(dtype for dtype, one in zip(dtypes, comparisons, strict=True) if not one.held)
    named = {one.name: str(one) for one in reversed(diagnosed(loss, batch, wrong_in))}
    return replace(report, mistakes=tuple(reversed(named.values())))
