"""A preference loss from hidden states in chunks of whole pairs: its gradients are made where its log-probs are."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch.pairs import connected
from ..ops.backends import Backend
from ..ops.linear import joined
from ..ops.linear.head import HeadInputs
from ..ops.linear.one_pass import with_gradients
from ..ops.linear.ranks import OneRank
from ..ops.linear.token_logprobs import Gradients
from ..ops.linear_ops import gradients_of, waiting_dtypes
from ..ops.preference_reference import PreferenceInputs
from .preference import PreferenceMetrics, evaluate

OF_HEAD, WEIGHTS = 3, ("token_weight", "divergence_weight")


class Found(NamedTuple):
    """loss: it carries the gradients. logp: [N], 0 where none was made. passes: over the chunks."""

    loss: Tensor
    metrics: PreferenceMetrics
    logp: Tensor
    passes: int


@dataclass(frozen=True)
class ChunkedLoss:
    """links: what computes the loss of log-probs. head, other: of the policy and, where its logits are needed beside
    them, of the reference. read, scored: bool [N], the tokens, and those with a divergence. leaves: hidden, weight,
    bias, token_weight, divergence_weight; wanted: which of them get a gradient. ranks: who holds the heads' rows."""

    links: Backend
    inputs: PreferenceInputs
    head: HeadInputs
    other: HeadInputs | None
    read: Tensor
    scored: Tensor
    leaves: Sequence[Tensor | None]
    wanted: Sequence[bool]
    main_grad: Tensor | None
    ranks: OneRank

    def find(self, ops: Any) -> Found | None:
        """None where the tokens that meet do not fit into a chunk: linear_token_logprobs makes no more flops then, but
        beside a divergence it would."""
        wanted = list(self.wanted[:OF_HEAD])
        with torch.no_grad(), torch.autocast(self.head.hidden.device.type, enabled=False):
            whole, (first, *dtypes) = self.ranks.of_all_tokens(self.head), waiting_dtypes(self.head, self.main_grad)
            grads = gradients_of(whole, wanted, [self.ranks.travels_in(first), *dtypes])
            evaluated = self._run(ops, whole, grads)
            if evaluated is None:
                return None
            of_hidden = None if grads.hidden is None else self.ranks.finish(grads.hidden).to(first)
        if of_hidden is not None:
            of_hidden = of_hidden.view(self.leaves[0].shape)  # type: ignore[union-attr]
        made = (of_hidden, grads.weight, grads.bias, *(evaluated.by.get(name) for name in WEIGHTS))
        carrying = with_gradients("linear_preference_loss")
        loss = carrying.apply(evaluated.loss, self.main_grad, *self.leaves, *made)
        return Found(loss, evaluated.metrics, evaluated.logp, evaluated.passes)

    def _run(self, ops: Any, head: HeadInputs, grads: Gradients) -> "_Evaluated | None":
        heads = [one.head(ops) for one in (self.head, self.other) if one is not None]
        budget, last, ranks = head.memory_budget, list[_Evaluated](), self.ranks
        most = functools.partial(joined.most_rows, heads, budget, grads, ranks)
        chunks = joined.chunks_of(self.read, self.inputs.layout.rows(), lambda: _parts(self.inputs), most)
        other = None if self.other is None else ranks.of_all_tokens(self.other).hidden
        run = functools.partial(joined.run, head, heads, other, self.scored, ranks=ranks)

        def evaluate_so_far(found: joined.PerToken) -> joined.ByToken:
            last[:] = [self._evaluate(found)]
            return last[0].by_token

        if chunks is not None:
            run(chunks, evaluate=evaluate_so_far, grads=grads)
            return last[0]
        if self.other is None:
            return None
        chunks = joined.even_chunks(self.read, heads, budget, grads, ranks)
        by_token = evaluate_so_far(run(chunks, evaluate=None, grads=Gradients(None, None, None)))
        if not any(self.wanted[:OF_HEAD]):
            return last[0]
        run(chunks, evaluate=lambda _: by_token, grads=grads)
        return last[0]._replace(passes=2)

    def _evaluate(self, found: joined.PerToken) -> "_Evaluated":
        """The loss of what is there by now, and its gradients."""
        given = {"logp": found.logp, "divergence": None if self.other is None else found.divergence}
        given |= dict(zip(WEIGHTS, self.leaves[OF_HEAD:], strict=True))
        asked = [name for name, want in zip(WEIGHTS, self.wanted[OF_HEAD:], strict=True) if want]
        with torch.enable_grad():
            at = {
                name: x.detach().requires_grad_(name not in WEIGHTS or name in asked)
                for name, x in given.items()
                if x is not None
            }
            of_tokens: dict[str, Any] = {name: at.get(name) for name in WEIGHTS}
            if self.other is not None:
                of_tokens["ref_logp"] = found.other_logp
            inputs = dataclasses.replace(self.inputs, **of_tokens)
            loss, metrics = evaluate(self.links, inputs, at["logp"], at.get("divergence"))
            names = [name for name in at if at[name].requires_grad]
            by = dict(zip(names, torch.autograd.grad(loss, [at[name] for name in names]), strict=True))
        return _Evaluated(loss.detach(), metrics, found.logp, by)


class _Evaluated(NamedTuple):
    """by: the loss's gradients by log-probs, divergences and weights [N]."""

    loss: Tensor
    metrics: PreferenceMetrics
    logp: Tensor
    by: dict[str, Tensor]
    passes: int = 1

    @property
    def by_token(self) -> joined.ByToken:
        return self.by["logp"], self.by.get("divergence")


def _parts(inputs: PreferenceInputs) -> list[int]:
    """For each sequence the same number where the loss lets them meet."""
    number, row, pairs = inputs.layout.num_sequences, inputs.row, inputs.sides
    if row.coupling.startswith("sorted") or (pairs is None and inputs.base is None):
        return [0] * number
    return list(range(number)) if pairs is None else connected(pairs, number)
