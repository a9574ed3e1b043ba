"""What linear_preference_loss computes: in chunks of whole pairs, or by way of all log-probs."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch.pairs import sides
from ..logprobs.divergence import head_pair, linear_token_divergence
from ..logprobs.from_hidden import HeadArguments, head_arguments, linear_token_logprobs
from ..logprobs.vocabulary import Vocabulary
from ..ops import ranges
from ..ops.backends import Backend
from ..ops.derivatives import transformed
from ..ops.linear.head import HeadInputs
from ..ops.linear.ranks import ONE, OneRank
from ..ops.preference_reference import PreferenceInputs
from .policy_arguments import BatchOnRanks
from .preference import evaluate
from .preference_chunks import ChunkedLoss

Tensors = tuple[Tensor, Tensor, Tensor | None]  # hidden, weight, bias
OF_LOGITS = ("temperature", "softcap", "logit_scale", "keep_mask")


class LinearPreferenceMetrics(NamedTuple):
    """PreferenceMetrics; logp: the log-probs of the ids, of their shape, 0 where none was made; passes: 1 or 2."""

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor
    logp: Tensor
    passes: int


@dataclass(frozen=True)
class Place:
    """Where heads and tokens lie."""

    vocab: Vocabulary | None
    context: BatchOnRanks | None
    reduce_hidden_grad: bool
    check: bool

    def head_of(self, hidden: Tensor, *head: Any, **options: Any) -> HeadArguments:
        """As of the whole batch."""
        of: Callable[..., HeadArguments] = head_arguments if self.vocab is None else self.vocab.head_arguments
        return of(hidden if self.context is None else self.context.hidden_of_batch(hidden), *head, **options)

    def own(self, x: Any) -> Any:
        """Of what may be one per token the own tokens'; x [N, ...]."""
        per_token = self.context is not None and isinstance(x, Tensor) and x.dim() > 0
        return self.context.take(x) if self.context is not None and per_token else x

    def whole(self, x: Tensor) -> Tensor:
        return x if self.context is None else self.context.gathered(x, check=False)

    def ranks(self, like: Tensor, chosen: Backend, head: HeadInputs) -> OneRank:
        if self.vocab is None:
            return ONE
        found: OneRank = self.vocab.ranks(like, self.reduce_hidden_grad, chosen, head)
        return found

    @property
    def options(self) -> dict[str, Any]:
        return {"vocab": self.vocab, "reduce_hidden_grad": self.reduce_hidden_grad, "check": self.check}


@dataclass(frozen=True)
class Call:
    """What both ways to compute it take. how: the options of both heads. links: what computes the loss of log-probs."""

    tensors: Tensors
    reference: Tensors | None
    ids: Tensor
    ignore_index: int
    how: dict[str, Any]
    backend: str | None
    links: Backend
    place: Place

    def loss(
        self, inputs: PreferenceInputs, head: HeadArguments, chosen: Backend
    ) -> tuple[Tensor, LinearPreferenceMetrics]:
        scored = _scored(inputs)
        nll_tokens = inputs.nll_tokens()
        read = scored if nll_tokens is None else scored | nll_tokens
        if self.reference is not None and inputs.row.divergence == 0:
            inputs = dataclasses.replace(inputs, ref_logp=self._reference_logp(scored))
        leaves = (self.tensors[0], head.weight, head.bias, inputs.token_weight, inputs.divergence_weight)
        wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
        helps = (any(wanted) or inputs.row.divergence > 0) and self.place.context is None
        if helps and not chosen.is_reference and not transformed():
            flat, other = head.inputs(self.ids, read.view(self.ids.shape), self.ignore_index), None
            if inputs.row.divergence > 0:
                other = self._other_inputs(scored)
            ranks = self.place.ranks(self.tensors[0], chosen, flat)
            chunked = ChunkedLoss(self.links, inputs, flat, other, read, scored, leaves, wanted, head.main_grad, ranks)
            if (found := chunked.find(ranges.kernels(str(chosen.namespace)))) is not None:
                shaped = found.logp.view(self.ids.shape)
                return found.loss, LinearPreferenceMetrics(*found.metrics, shaped, found.passes)
        logp = self._logp(self.tensors, read, head.main_grad)
        divergence = None
        if inputs.row.divergence > 0:
            inputs = dataclasses.replace(inputs, ref_logp=self._reference_logp(scored))
            divergence = self._divergence(scored)
        loss, metrics = evaluate(self.links, inputs, logp, divergence)
        return loss, LinearPreferenceMetrics(*metrics, logp.detach().view(self.ids.shape), 2 if any(wanted) else 1)

    def _other_inputs(self, rows: Tensor) -> HeadInputs:
        """The reference's head."""
        assert self.reference is not None
        options = [self.how[name] for name in OF_LOGITS]
        pair = ((*self.tensors, *options), (*self.reference, *options))
        budget = self.how["memory_budget"]
        where = rows.view(self.ids.shape)
        return head_pair(*pair, where, self.how["compute_dtype"], budget, self.place.vocab)[1]

    def _logp(self, tensors: Tensors, rows: Tensor, main_grad: Tensor | None = None) -> Tensor:
        (hidden, weight, bias), own = tensors, self.place.own
        found = linear_token_logprobs(
            hidden, weight, own(self.ids), bias=bias, row_mask=own(rows.view(self.ids.shape)),
            ignore_index=self.ignore_index, outputs=["logp"], main_grad=main_grad, backend=self.backend,
            **self._own_how(), **self.place.options,
        )  # fmt: skip
        return self.place.whole(found.logp.reshape(-1))

    def _own_how(self) -> dict[str, Any]:
        how = self.how | {"temperature": self.place.own(self.how["temperature"])}
        keep = self.how["keep_mask"]
        return how | ({"keep_mask": self.place.own(keep)} if keep is not None and keep.dim() > 1 else {})

    def _reference_logp(self, rows: Tensor) -> Tensor:
        assert self.reference is not None
        with torch.no_grad():  # as a decorator of a method it does not trace
            return self._logp(self.reference, rows)

    def _divergence(self, rows: Tensor) -> Tensor:
        assert self.reference is not None
        (hidden, weight, bias), (other, other_weight, other_bias) = self.tensors, self.reference
        how = self._own_how()
        others = {f"other_{name}": x for name, x in how.items() if name in OF_LOGITS}
        found = linear_token_divergence(
            hidden, weight, other, other_weight, bias=bias, other_bias=other_bias, backend=self.backend,
            row_mask=self.place.own(rows.view(self.ids.shape)), **how, **others, **self.place.options,
        )  # fmt: skip
        return self.place.whole(found.reshape(-1))


def _scored(inputs: PreferenceInputs) -> Tensor:
    """bool [N]: the tokens of sequences that some link meets."""
    valid, pairs = inputs.layout.valid(), inputs.sides
    return valid if pairs is None else valid & inputs.layout.spread(sides(pairs, inputs.layout) != 0)
