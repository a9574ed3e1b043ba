"""linear_preference_loss: preference_loss from hidden states and the head, without the logits."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch.checks import check_constant
from ..batch.layout import Layout, layout_of
from ..batch.pairs import connected, sides
from ..errors import renamed, wrong
from ..logprobs.divergence import head_pair, linear_token_divergence
from ..logprobs.from_hidden import HeadArguments, head_arguments, linear_token_logprobs
from ..logprobs.from_logits import IGNORED, check_ids
from ..objectives.preference import Preference, preference
from ..observed import observed
from ..ops import ranges
from ..ops.backends import Backend
from ..ops.linear import joined
from ..ops.linear.gemm import sum_dtype
from ..ops.linear.head import HeadInputs
from ..ops.linear.one_pass import with_gradients
from ..ops.linear_ops import gradients_of, waiting_dtypes
from ..ops.preference_dispatch import backend_of
from ..ops.preference_reference import PreferenceInputs
from .preference import PreferenceMetrics, evaluate
from .preference_arguments import check_needed, check_used, preference_inputs

Tensors = tuple[Tensor, Tensor, Tensor | None]  # hidden, weight, bias
WEIGHTS = ("token_weight", "divergence_weight")
OF_LOGITS = ("temperature", "softcap", "logit_scale", "keep_mask")


class LinearPreferenceMetrics(NamedTuple):
    """PreferenceMetrics; logp: the log-probs of the ids, of their shape, 0 where none was made; passes: 1 or 2."""

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor
    logp: Tensor
    passes: int


@observed
def linear_preference_loss(
    objective: str | Preference,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    ref_logp: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    keep_mask: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    pairs: Tensor | None = None,
    desirable: Tensor | None = None,
    kl: float | Tensor | None = None,
    reward_shift: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    divergence_weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    nll_mask: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    ignore_index: int = IGNORED,
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, LinearPreferenceMetrics]:
    """preference_loss of the log-probs of linear_token_logprobs, with its gradients, in one pass over chunks of tokens.

    hidden: [B, T, D], or packed [N, D] with cu_seqlens. ids: integers [B, T] or [N], aligned with hidden (never shifted
    here); ignore_index takes a token out like the masks do. weight, bias, temperature to keep_mask, compute_dtype: as
    for linear_token_logprobs. mask to nll_normalizer: as for preference_loss.
    ref_logp: of the shape of ids; or ref_hidden, [B, T, D'] or [N, D'], of which it is made here, with ref_weight
    [V, D'], ref_bias and the options and dtype of the trained head. ref_weight None: weight and bias, then frozen
    (an adapter's base model). Rows with a divergence, KL of the reference to the policy, need ref_hidden and make that
    here too; there compute_dtype may not be fp16. The reference gets no gradient: a tensor of it that requires grad
    raises.

    The loss carries the gradients of hidden, weight, bias, token_weight and divergence_weight, each computed in the
    forward only where it is required; the backward multiplies them by the upstream gradient. Chunks are of whole pairs,
    as many as memory_budget allows (as for linear_policy_loss): 6 N D V flops, and 2 N D' V of a reference. Where a
    pair does not fit into one, or fewer than 64 tokens do, and where a row sorts the batch that does not fit as a
    whole, the gradients need a second pass, 8 N D V, and with a divergence those of linear_token_divergence too, so
    that a larger budget pays (a third of it is a chunk's there): metrics.passes says which. So it is in a trace by
    torch.compile.
    Tokens that the masks leave out, and sequences in no pair, enter no GEMM and may hold anything; tokens whose
    coefficient is zero enter none of the backward where there is no divergence.

    Returns (loss 0-d, LinearPreferenceMetrics). Differentiating twice raises, but for backend="reference". Errors:
    ValueError naming the argument, what was given and what is accepted.
    """
    row = preference(objective)
    how: dict[str, Any] = {
        "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "keep_mask": keep_mask,
        "compute_dtype": compute_dtype, "memory_budget": memory_budget,
    }  # fmt: skip
    head = head_arguments(hidden, weight, bias, **how, main_grad=None)
    how["compute_dtype"] = head.like.dtype  # said to have been chosen, once
    check_ids(head.like, ids, ())
    if ids.dim() != hidden.dim() - 1:
        raise wrong("ids", f"shape {list(ids.shape)}", f"one id per token, {list(hidden.shape[:-1])}")
    layout = layout_of(ids, mask=mask, cu_seqlens=cu_seqlens, name="ids")
    named = ids.reshape(-1) != ignore_index
    layout = dataclasses.replace(layout, mask=named if layout.mask is None else named & layout.mask)
    reference = _reference(row, (weight, bias), ref_logp, ref_hidden, ref_weight, ref_bias, how, head)
    if reference is not None:  # made below, from hidden states
        ref_logp = ids.new_zeros(ids.shape, dtype=sum_dtype(head.like.dtype))
    inputs = preference_inputs(
        row, layout, ref_logp=ref_logp, pairs=pairs, desirable=desirable, kl=kl, reward_shift=reward_shift,
        token_weight=token_weight, divergence_weight=divergence_weight, pair_weight=pair_weight,
        nll_mask=_named(nll_mask, named, layout), normalizer=normalizer, nll_normalizer=nll_normalizer,
    )  # fmt: skip
    call = _Call((hidden, weight, bias), reference, ids, ignore_index, how, backend)
    return call.loss(inputs, head, backend_of(backend, hidden.device, row))


def _reference(
    row: Preference, own: tuple[Tensor, Tensor | None], ref_logp: Tensor | None, hidden: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, how: dict[str, Any], head: HeadArguments,
) -> Tensors | None:  # fmt: skip
    """The reference's hidden states, weight and bias, checked; None where its log-probs are given, or none wanted."""
    if hidden is None:
        for name, x in (("ref_weight", weight), ("ref_bias", bias)):
            if x is not None:
                raise wrong(name, "one", "None without ref_hidden")
        check_needed(row, "ref_hidden", None, row.divergence > 0)
        return None
    check_used(row, "ref_hidden", hidden, row.reference == "given")
    if ref_logp is not None:
        raise wrong("ref_logp", "one", "None beside ref_hidden, of which it is made")
    weight, bias = (weight, bias) if weight is not None else _shared(own, bias)
    other = renamed("ref", head_arguments, hidden, weight, bias, *how.values(), None)
    for name, x in (("ref_hidden", hidden), ("ref_weight", weight), ("ref_bias", bias)):
        if x is not None:
            check_constant(name, x)
    if other.like.shape != head.like.shape:
        shapes = f"a head of logits {list(other.like.shape)}", f"those of the trained one, {list(head.like.shape)}"
        raise wrong("ref_hidden", *shapes)
    return hidden, weight, bias


def _shared(own: tuple[Tensor, Tensor | None], ref_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The head of policy and reference."""
    if ref_bias is not None:
        raise wrong("ref_bias", "one", "None without ref_weight: the policy's weight comes with its own")
    if any(x is not None and x.requires_grad for x in own):
        raise wrong("ref_weight", None, "the reference's, as weight is trained (weight.detach() for its value now)")
    return own


def _named(nll_mask: Tensor | None, named: Tensor, layout: Layout) -> Tensor | None:
    """Without ids to ignore; what is no mask is left to the checks."""
    if not isinstance(nll_mask, Tensor) or nll_mask.dtype != torch.bool:
        return nll_mask
    fits = nll_mask.shape == layout.shape and nll_mask.device == named.device
    return nll_mask & named.view(layout.shape) if fits else nll_mask


def _scored(inputs: PreferenceInputs) -> Tensor:
    """bool [N]: the tokens of sequences that some link meets."""
    valid, pairs = inputs.layout.valid(), inputs.sides
    return valid if pairs is None else valid & inputs.layout.spread(sides(pairs, inputs.layout) != 0)


@dataclass(frozen=True)
class _Call:
    """What both ways to compute it take. how: the options of both heads."""

    tensors: Tensors
    reference: Tensors | None
    ids: Tensor
    ignore_index: int
    how: dict[str, Any]
    backend: str | None

    def loss(
        self, inputs: PreferenceInputs, head: HeadArguments, chosen: Backend
    ) -> tuple[Tensor, LinearPreferenceMetrics]:
        scored = _scored(inputs)
        nll_tokens = inputs.nll_tokens()
        read = scored if nll_tokens is None else scored | nll_tokens
        if self.reference is not None and inputs.row.divergence == 0:
            inputs = dataclasses.replace(inputs, ref_logp=self._reference_logp(scored))
        leaves = (*self.tensors, inputs.token_weight, inputs.divergence_weight)
        wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
        if any(wanted) and not chosen.is_reference and not torch.compiler.is_compiling():
            flat = head.inputs(self.ids, read.view(self.ids.shape), self.ignore_index)
            other = self._other_inputs(inputs.row, scored)
            found = _one_pass(chosen, inputs, flat, other, scored, read, leaves, wanted)
            if found is not None:
                loss, metrics, logp = found
                return loss, LinearPreferenceMetrics(*metrics, logp.view(self.ids.shape), 1)
        logp = self._logp(self.tensors, read)
        divergence = None
        if inputs.row.divergence > 0:
            inputs = dataclasses.replace(inputs, ref_logp=self._reference_logp(scored))
            divergence = self._divergence(scored)
        loss, metrics = evaluate(chosen, inputs, logp, divergence)
        return loss, LinearPreferenceMetrics(*metrics, logp.detach().view(self.ids.shape), 2 if any(wanted) else 1)

    def _other_inputs(self, row: Preference, rows: Tensor) -> HeadInputs | None:
        """The reference's head, where its logits are needed beside the policy's."""
        if row.divergence == 0 or self.reference is None:
            return None
        options = [self.how[name] for name in OF_LOGITS]
        pair = ((*self.tensors, *options), (*self.reference, *options))
        budget = self.how["memory_budget"]
        return head_pair(*pair, rows.view(self.ids.shape), self.how["compute_dtype"], budget)[1]

    def _logp(self, tensors: Tensors, rows: Tensor) -> Tensor:
        hidden, weight, bias = tensors
        return linear_token_logprobs(
            hidden, weight, self.ids, bias=bias, row_mask=rows.view(self.ids.shape), ignore_index=self.ignore_index,
            outputs=["logp"], backend=self.backend, **self.how,
        ).logp.reshape(-1)  # fmt: skip

    def _reference_logp(self, rows: Tensor) -> Tensor:
        assert self.reference is not None
        with torch.no_grad():  # as a decorator of a method it does not trace
            return self._logp(self.reference, rows)

    def _divergence(self, rows: Tensor) -> Tensor:
        assert self.reference is not None
        (hidden, weight, bias), (other, other_weight, other_bias) = self.tensors, self.reference
        others = {f"other_{name}": x for name, x in self.how.items() if name in OF_LOGITS}
        return linear_token_divergence(
            hidden, weight, other, other_weight, bias=bias, other_bias=other_bias, backend=self.backend,
            row_mask=rows.view(self.ids.shape), **self.how, **others,
        ).reshape(-1)  # fmt: skip


def _one_pass(
    chosen: Backend, inputs: PreferenceInputs, flat: HeadInputs, other: HeadInputs | None, scored: Tensor, read: Tensor,
    leaves: Sequence[Tensor | None], wanted: Sequence[bool],
) -> tuple[Tensor, PreferenceMetrics, Tensor] | None:  # fmt: skip
    """(the loss with the gradients of its leaves, the metrics, the log-probs [N]); None where the tokens that meet do
    not fit into a chunk. leaves: hidden, weight, bias, token_weight, divergence_weight."""
    ops = ranges.kernels(str(chosen.namespace))
    heads = [one.head(ops) for one in (flat, other) if one is not None]
    last: list[Any] = []

    def evaluated(found: joined.PerToken) -> tuple[Tensor, Tensor | None]:
        given = {"logp": found.logp, "divergence": found.divergence if other is not None else None}
        given |= dict(zip(WEIGHTS, leaves[3:], strict=True))
        want = {"logp", "divergence", *(name for name, w in zip(WEIGHTS, wanted[3:], strict=True) if w)}
        with torch.enable_grad():
            at = {name: x.detach().requires_grad_(name in want) for name, x in given.items() if x is not None}
            ref_logp = inputs.ref_logp if other is None else found.other_logp
            of_tokens: dict[str, Any] = {name: at.get(name) for name in WEIGHTS}
            made = dataclasses.replace(inputs, ref_logp=ref_logp, **of_tokens)
            loss, metrics = evaluate(chosen, made, at["logp"], at.get("divergence"))
            names = [name for name in at if name in want]
            by = dict(zip(names, torch.autograd.grad(loss, [at[name] for name in names]), strict=True))
        last[:] = loss.detach(), metrics, found.logp, *(by.get(name) for name in WEIGHTS)
        return by["logp"], by.get("divergence")

    with torch.no_grad(), torch.autocast(flat.hidden.device.type, enabled=False):
        grads = gradients_of(flat, list(wanted[:3]), waiting_dtypes(flat))
        chunks = joined.chunks_of(
            read, inputs.layout.rows(), lambda: _parts(inputs),
            lambda count: joined.most_rows(heads, flat.memory_budget, grads, count),
        )  # fmt: skip
        if chunks is None:
            return None
        joined.run(flat, heads, None if other is None else other.hidden, scored, chunks, evaluated, grads)
    loss, metrics, logp, *of_weights = last
    of_hidden = None if grads.hidden is None else grads.hidden.view(leaves[0].shape)  # type: ignore[union-attr]
    made = (of_hidden, grads.weight, grads.bias, *of_weights)
    return with_gradients("linear_preference_loss").apply(loss, *leaves, *made), metrics, logp


def _parts(inputs: PreferenceInputs) -> list[int]:
    """For each sequence the same number where the loss lets them meet."""
    number, row, pairs = inputs.layout.num_sequences, inputs.row, inputs.sides
    if row.coupling.startswith("sorted") or (pairs is None and inputs.base is None):
        return [0] * number
    return list(range(number)) if pairs is None else connected(pairs, number)
