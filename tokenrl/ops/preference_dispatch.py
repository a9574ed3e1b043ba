"""The preference loss as in dispatch.py: the reference, or a backend's kernels, with their derivative."""

import torch
from torch import Tensor

from ..objectives.links import LINKS
from ..objectives.scores import SCORES
from . import preference_reference
from .backends import BACKENDS, Backend, choose
from .derivatives import call
from .preference_ops import PreferenceOpInputs
from .preference_reference import Number, PreferenceInputs, Result


def backend_of(name: str | None, inputs: PreferenceInputs) -> Backend:
    """The one for a call."""
    return choose(name, inputs.layout.cu_seqlens.device, own=_without_kernel(inputs))


def of_logp_by(head: Backend, inputs: PreferenceInputs) -> Backend:
    """The one for log-probs that `head` makes: the same, or the reference of what no kernel knows."""
    return head if _without_kernel(inputs) is None else BACKENDS["reference"]


def _without_kernel(inputs: PreferenceInputs) -> str | None:
    """What no kernel knows of it: a link or a score of one's own, or, as no kernel keeps that slope, the reference's
    share of a weight's gradient."""
    row, weight = inputs.row, inputs.token_weight
    if row.coupling == "sorted_margins" and inputs.ref_logp is not None and weight is not None and weight.requires_grad:
        return f"the gradient of token_weight in objective {row.name!r}"
    parts = ((row.link, LINKS.get(row.link.name), "link"), (row.score, SCORES.get(row.score.name), "score"))
    own = [f"the {what} {type(part).__name__!r}" for part, packaged, what in parts if type(part) is not packaged]
    return own[0] if own else None


def preference(chosen: Backend, inputs: PreferenceInputs, logp: Tensor, divergence: Tensor | None) -> Result:
    """Of log-probs and divergences [N]."""
    if chosen.is_reference:
        return preference_reference.preference(inputs, logp, divergence)
    row, layout = inputs.row, inputs.layout
    like = logp.dtype
    loss, _, rewards, accuracy = call(
        chosen.namespace, "preference", *PreferenceOpInputs(
            logp, _cast(divergence, like), _cast(inputs.token_weight, like), _cast(inputs.divergence_weight, like),
            _cast(inputs.ref_logp, like), layout.mask, layout.cu_seqlens, inputs.pairs, inputs.desirable, inputs.base,
            inputs.pair_weight, _number(inputs.normalizer, layout.cu_seqlens), inputs.nll_mask,
            _number(inputs.nll_normalizer, layout.cu_seqlens), row.link.name, row.link.params(), row.score.name,
            row.score.params(), row.statistic, row.coupling, float(row.divergence), row.divergence_flow,
            float(row.length), float(row.nll),
        )
    )  # fmt: skip
    return Result(loss, rewards, accuracy)


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """With a gradient; without a call into torch where there is nothing to do."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


def _number(x: Number | None, like: Tensor) -> Tensor | None:
    """0-d fp64 where `like` is."""
    if x is None or isinstance(x, Tensor):
        return x
    return torch.full((), x, dtype=torch.float64, device=like.device)
