"""A loss of a batch on the reference, step by step: what is tested is held to it, and its steps may be changed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...batch.layout import Layout
from ...batch.spans import span_starts
from ...objectives.gates.base import map_params
from ...objectives.policy import Objective
from ...ops import backends, dispatch
from ..rollout_batch import RolloutBatch
from .around import Seen, Watched
from .tolerance import ULPS

EPS = torch.finfo(torch.float32).eps
HEADS = ("logits", "hidden", "weight", "bias")


@dataclass(frozen=True)
class Computation:
    """What a loss is computed from: a batch, a row, the log-probs and, where the loss takes them from the head, the
    entropies, differentiable in what gradients are taken by."""

    batch: RolloutBatch
    row: Objective
    logp: Tensor
    entropy: Tensor | None = None

    @property
    def layout(self) -> Layout:
        return self.batch.layout

    @property
    def starts(self) -> Tensor | None:
        """bool [N], flat: where segments begin inside sequences."""
        ids, layout = self.batch.tensors.get("segment_ids"), self.layout
        return None if ids is None else span_starts(layout.flat_tokens("segment_ids", ids), layout)

    def statistic(self, name: str, x: Tensor) -> Tensor:
        """A statistic of x, flat [N], over each token's span."""
        return dispatch.statistic(
            backends.BACKENDS["reference"], self.layout, x, torch.zeros_like(x), self.starts, name, "through"
        )

    def positions(self) -> Tensor:
        """[N]: the 1-based count of valid tokens in each token's span, of the dtype of logp."""
        return self.statistic("prefix_sum", self.layout.valid().to(self.logp.dtype))

    def changed(self, **tensors: Tensor | None) -> "Computation":
        """With other tensors in the batch; None takes one out."""
        kept = {**self.batch.tensors, **tensors}
        return replace(self, batch=replace(self.batch, tensors={name: x for name, x in kept.items() if x is not None}))

    def with_row(self, **changes: Any) -> "Computation":
        """With other fields of the row."""
        return replace(self, row=replace(self.row, **changes))

    def set(self, **settings: object) -> "Computation":
        """With other settings of the batch."""
        return replace(self, batch=replace(self.batch, settings={**self.batch.settings, **settings}))

    def run(self) -> tuple[Tensor, Watched]:
        """The loss, and what its gate saw."""
        layout, dtype = self.layout, self.logp.dtype

        def flat(name: str, bound: Tensor) -> Tensor:
            return torch.where(layout.valid(), layout.flat_tokens(name, bound.to(self.logp.device), dtype), 1)

        watched = Watched(map_params(self.row.gate, flat))
        with nullcontext() if self.row.form is None else drawing_alike():
            loss, _ = self.batch.loss(
                replace(self.row, gate=watched), logp=self.logp, entropy=self.entropy, backend="reference"
            )
        return loss, watched


Change = Callable[[Computation], Computation]


@dataclass(frozen=True)
class Outcome:
    """value: 0-d. gradients: by tensor. terms: summands of the value, 1-d, where they are known."""

    value: Tensor
    gradients: dict[str, Tensor]
    terms: Tensor | None = None


@contextmanager
def drawing_alike() -> Iterator[None]:
    """clip_cov draws tokens, and in each run the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def as_it_is(computation: Computation) -> Computation:
    return computation


def without_head(batch: RolloutBatch, **instead: Tensor) -> RolloutBatch:
    """The batch with log-probs, or logits, in place of its head."""
    kept = {name: x for name, x in batch.tensors.items() if name not in HEADS}
    return replace(batch, tensors=kept | {name: x.detach() for name, x in instead.items()})


def with_leaves(batch: RolloutBatch, leaves: Sequence[str]) -> RolloutBatch:
    """Copies of these tensors, that require a gradient."""
    own = {name: batch.tensors[name].detach().clone().requires_grad_() for name in leaves}
    return replace(batch, tensors={**batch.tensors, **own})


def outcome(batch: RolloutBatch, row: Objective, leaves: Sequence[str], change: Change = as_it_is) -> Outcome:
    """Value, gradients and terms on the reference, in the batch's precision."""
    batch = with_leaves(batch, leaves)
    loss, watched = change(Computation(batch, row, *batch.scored("reference"))).run()
    given = [batch.tensors[name] for name in leaves]
    found = torch.autograd.grad(loss, [*given, *watched.values], allow_unused=True, materialize_grads=True)
    weights = found[len(given) :]
    pairs = zip(weights, watched.values, strict=True)
    terms = [torch.where(w != 0, w * value.detach(), 0) for w, value in pairs]
    rest = loss.detach() - sum(term.sum() for term in terms)  # the KL and the entropy, or all of it
    return Outcome(loss.detach(), dict(zip(leaves, found, strict=False)), torch.cat([*terms, rest.reshape(1)]))


def seen(batch: RolloutBatch, row: Objective) -> Seen:
    """What the gate sees, in the batch's precision."""
    with torch.no_grad():
        return Computation(batch, row, *batch.scored("reference")).run()[1].seen[-1]


@dataclass(frozen=True)
class Undecided:
    """Tokens whose gradient rounding decides, since they are at a clip edge or another jump: bool of the tokens' shape;
    and by how much the loss jumps there."""

    tokens: Tensor
    jump: float

    @property
    def count(self) -> int:
        return int(self.tokens.sum())


def undecided(batch: RolloutBatch, row: Objective, change: Change = as_it_is) -> Undecided:
    """By moving the statistic of each token as far as rounding does: what is smooth moves by the square of that in a
    second difference, what jumps by its jump."""
    start = Computation(batch, row, *batch.scored("reference"))
    computation, valid = change(start), start.layout.valid().view(start.layout.shape)
    old = computation.batch.tensors.get("old_logp")
    if old is None or not valid.any():
        return Undecided(torch.zeros_like(valid), 0.0)
    step, found = _rounding(start) * _moving(start), []
    for shift in (-step, 0 * step, step):
        logp = computation.logp.detach().requires_grad_()
        loss, _ = replace(computation, logp=logp).changed(old_logp=old - shift).run()
        found.append((loss.detach(), *torch.autograd.grad(loss, logp, allow_unused=True, materialize_grads=True)))
    jump, jumps = (below - 2 * here + above for below, here, above in zip(*found, strict=True))
    largest = torch.where(valid, found[1][1], 0).abs().max()
    return Undecided(valid & (jumps.abs() > ULPS * EPS * largest), jump.abs().item())


def _rounding(start: Computation) -> float:
    """How far fp32 may err in a token's statistic."""
    logp, old, valid = start.logp.flatten(), start.batch.tensors["old_logp"].flatten(), start.layout.valid()
    found = []
    for dtype in (torch.float32, torch.float64):
        x = torch.where(valid, logp.to(dtype) - old.to(dtype), 0)
        found.append(start.statistic(start.row.statistic, x).double()[valid])
    size = max(logp[valid].abs().max().item(), found[1].abs().max().item(), 1.0)
    return 4 * (found[0] - found[1]).abs().max().item() + ULPS * EPS * size


def _moving(start: Computation) -> Tensor:
    """Whose log ratios move so that every token's statistic does: of a sum the first ones, else all."""
    if not start.row.statistic.endswith("_sum"):
        return torch.ones_like(start.logp)
    first = (start.positions() == 1) & start.layout.valid()
    return first.view(start.logp.shape).to(start.logp.dtype)
