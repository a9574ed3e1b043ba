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
    """What is tested: the value 0-d, and the gradients by tensor."""

    value: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Evaluated:
    """What the reference gives at some log-probs: the value 0-d; summands of it, 1-d; its gradients by the log-probs
    and, where it takes them from the head, the entropies, of the tokens' shape; what the gate saw."""

    value: Tensor
    terms: Tensor
    by_logp: Tensor
    by_entropy: Tensor | None
    seen: Seen


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
    """These tensors require a gradient."""
    own = {name: batch.tensors[name].detach().requires_grad_() for name in leaves}
    return replace(batch, tensors={**batch.tensors, **own})


def evaluated(computation: Computation) -> Evaluated:
    logp = computation.logp.detach().requires_grad_()
    entropy = None if computation.entropy is None else computation.entropy.detach().requires_grad_()
    loss, watched = replace(computation, logp=logp, entropy=entropy).run()
    leaves = [logp] if entropy is None else [logp, entropy]
    found = torch.autograd.grad(loss, [*leaves, *watched.values], allow_unused=True, materialize_grads=True)
    weights, value = found[len(leaves) :], loss.detach()
    terms = [torch.where(w != 0, w * x.detach(), 0) for w, x in zip(weights, watched.values, strict=True)]
    rest = value - sum(term.sum() for term in terms)  # the KL and the entropy, or all of it
    by_entropy = None if entropy is None else found[1]
    return Evaluated(value, torch.cat([*terms, rest.reshape(1)]), found[0], by_entropy, watched.seen[-1])
