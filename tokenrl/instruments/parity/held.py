"""A batch and its row on the reference: in fp64, and what in a precision errs as far as it may."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ...objectives.policy import Objective
from ..rollout_batch import RolloutBatch
from .around import Seen
from .computation import HEADS, Change, Computation, Evaluated, Outcome, as_it_is, evaluated, without_head
from .head_rows import Part, Scores, pulled_back, scores
from .noise import Undecided, farthest, noisy, undecided

Dtype = torch.dtype | None  # None: that of the batch


def leaves_of(batch: RolloutBatch) -> tuple[str, ...]:
    """What gradients are taken by: logits, hidden states with the head, or log-probs."""
    return tuple(name for name in HEADS if name in batch.tensors) or ("logp",)


class Held:
    """Each of it computed once. leaves: what gradients are taken by. change: a mistake; the batch is then held whole in
    fp64, and else in parts. eager: what is tested may take its log-probs by torch's log_softmax."""

    def __init__(self, batch: RolloutBatch, leaves: tuple[str, ...], change: Change = as_it_is, eager: bool = False):
        self.batch, self.leaves, self.change, self.eager = batch, leaves, change, eager
        self._scores: dict[tuple[Dtype, bool], Scores] = {}
        self._others: dict[Dtype, list[Evaluated]] = {}
        self._undecided: dict[Dtype, Undecided] = {}
        self._outcomes: dict[Dtype, Outcome] = {}

    @property
    def row(self) -> Objective:
        return self.batch.objective

    def without(self, tokens: Tensor) -> "Held":
        """Some tokens take no part in the loss."""
        if not tokens.any():
            return self
        weight = self.batch.tensors.get("token_weight", torch.ones(tokens.shape))
        kept = {**self.batch.tensors, "token_weight": torch.where(tokens, 0, weight)}
        other = Held(replace(self.batch, tensors=kept), self.leaves, self.change, self.eager)
        other._scores = self._scores  # a head has no weights
        return other

    def with_change(self, change: Change) -> "Held":
        other = Held(self.batch, self.leaves, change, self.eager)
        other._scores = self._scores
        return other

    def given(self, dtype: Dtype) -> RolloutBatch:
        return self.batch if dtype is None else self.batch.cast(dtype)

    def working(self, dtype: Dtype) -> torch.dtype:
        """In which log-probs are computed and summed."""
        return torch.promote_types(dtype or self.batch.tensors[self.batch.leaf].dtype, torch.float32)

    def scores(self, dtype: Dtype, eager: bool = False) -> Scores:
        if (dtype, eager) not in self._scores:
            self._scores[dtype, eager] = scores(self.batch, dtype, eager)
        return self._scores[dtype, eager]

    def start(self) -> Computation:
        """In fp64 with its head, and without a KL whose coefficient is 0."""
        start = Computation(self.given(torch.float64), self.row, *self.scores(torch.float64))
        return start if self.batch.settings.get("kl_coef") else start.changed(ref_logp=None)

    def computed(self, dtype: Dtype, eager: bool = False) -> Computation:
        """What is tested, in a precision, without a graph."""
        logp, entropy = self.scores(dtype, eager)[0], self.scores(dtype)[1]
        batch = self.batch if self.change is not as_it_is else without_head(self.batch, logp=logp)
        return self.change(Computation(batch.cast(self.working(dtype)), self.row, logp, entropy))

    @cached_property
    def exact(self) -> Computation:
        return self.computed(torch.float64)

    @cached_property
    def truth(self) -> Evaluated:
        return evaluated(self.exact)

    def _errors(self, dtype: Dtype) -> list[Tensor]:
        """Of log-probs: of fp64 ones, which nothing here can measure, as of fp32 ones times the ratio of their eps."""
        if self.working(dtype) == torch.float64:
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            return [ratio * error for error in self._errors(torch.float32)]
        found = [self.computed(dtype).logp.double() - self.exact.logp]
        if self.eager:
            found.append(self.scores(dtype, True)[0].double() - self.scores(torch.float64)[0])
        return found

    def others(self, dtype: Dtype) -> list[Evaluated]:
        """Evaluated as a precision errs, first the reference itself."""
        if dtype not in self._others:
            working, own = self.working(dtype), self.computed(dtype)
            eps = torch.finfo(working).eps
            found = [
                own,
                *(
                    replace(own, logp=x.to(working))
                    for x in noisy(self.exact, self.truth.seen.s, self._errors(dtype), eps)
                ),
            ]
            if self.eager and self.change is as_it_is:
                found.append(self.computed(dtype, eager=True))
            self._others[dtype] = [evaluated(one) for one in found]
        return self._others[dtype]

    def base(self, dtype: Dtype) -> Evaluated:
        """fp32 is summed in fp64 by our kernels and in pairs by torch; of fp64 n sums in a row err by n roundings."""
        longest, working = self.batch.layout.cu_seqlens.diff(), self.working(dtype)
        row = working == torch.float64 and longest.numel() > 0
        return farthest(self.truth, self.others(dtype), int(longest.max()) * torch.finfo(working).eps if row else 0.0)

    def undecided(self, dtype: Dtype) -> Undecided:
        if dtype not in self._undecided:
            eps = torch.finfo(self.working(dtype)).eps
            self._undecided[dtype] = undecided(self.exact, self.truth, self.others(dtype), eps)
        return self._undecided[dtype]

    def seen(self, dtype: Dtype) -> Seen:
        """What the gate sees, in a precision, whatever else the loss has."""
        with torch.no_grad():
            return self.computed(dtype).set(entropy_coef=0.0).run()[1].seen[-1]

    def rows(self, at: Evaluated, dtype: Dtype) -> Iterator[Part]:
        """Gradients by the leaves, part by part."""
        return pulled_back(self.batch, self.leaves, dtype, (at.by_logp, at.by_entropy), self.change)

    def outcome(self, dtype: Dtype) -> Outcome:
        """Of the reference itself, whole."""
        if dtype not in self._outcomes:
            own, found = self.others(dtype)[0], {name: [] for name in self.leaves}  # type: ignore[var-annotated]
            for _, part in self.rows(own, dtype):
                for name, x in part.items():
                    found[name].append(x)
            tensors = self.given(dtype).tensors
            gradients = {name: torch.cat(x).view_as(tensors[name]) for name, x in found.items()}
            self._outcomes[dtype] = Outcome(own.value, gradients)
        return self._outcomes[dtype]
