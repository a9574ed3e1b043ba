"""The checking half of the preference losses: all checks of a call, once, for both fronts."""

import torch
from torch import Tensor

from ..batch.checks import as_saved, as_scalar, check_constant, check_floats, check_number, check_tensor
from ..batch.layout import Layout
from ..batch.pairs import checked_pairs
from ..errors import wrong
from ..objectives.links import OfLabels
from ..objectives.preference import Preference
from ..ops.preference_reference import Number, PreferenceInputs


def preference_inputs(
    row: Preference, layout: Layout, *, ref_logp: Tensor | None, pairs: Tensor | None, desirable: Tensor | None,
    kl: Number | None, reward_shift: Number | None, token_weight: Tensor | None, divergence_weight: Tensor | None,
    pair_weight: Tensor | None, nll_mask: Tensor | None, normalizer: Number | None, nll_normalizer: Number | None,
) -> PreferenceInputs:  # fmt: skip
    labelled = isinstance(row.link, OfLabels)
    compared = row.link.compared if isinstance(row.link, OfLabels) else ""
    check_needed(row, "ref_logp", ref_logp, row.reference == "given")
    check_needed(row, "desirable", desirable, labelled)
    check_needed(row, "kl", kl, compared == "kl")
    for name, given, used in (
        ("reward_shift", reward_shift, compared == "reward_shift"), ("pairs", pairs, not labelled),
        ("divergence_weight", divergence_weight, row.divergence > 0), ("nll_mask", nll_mask, row.nll > 0),
        ("nll_normalizer", nll_normalizer, row.nll > 0),
        ("pair_weight", pair_weight, not row.coupling.startswith("sorted")),
    ):  # fmt: skip
        check_used(row, name, given, used)
    if ref_logp is not None:
        check_floats("ref_logp", ref_logp)
        check_constant("ref_logp", ref_logp)
        ref_logp = layout.flat_tokens("ref_logp", ref_logp)
    labels = None if desirable is None else _labels(desirable, layout)
    both = checked_pairs(pairs, layout) if labels is None else None
    count = layout.num_sequences if labels is not None else layout.num_sequences // 2 if both is None else len(both)
    return PreferenceInputs(
        row, layout, ref_logp, _weight("token_weight", token_weight, layout),
        _weight("divergence_weight", divergence_weight, layout), both, labels,
        _base(row, kl, reward_shift, layout.cu_seqlens.device),
        None if pair_weight is None else _pair_weight(pair_weight, count, layout.cu_seqlens.device),
        _count("normalizer", normalizer, layout), _nll_mask(nll_mask, layout), 
        _count("nll_normalizer", nll_normalizer, layout),
    )  # fmt: skip


def check_needed(row: Preference, name: str, given: object, wanted: bool) -> None:
    """That it is there where it is wanted, and nowhere else."""
    if wanted and given is None:
        raise wrong(name, None, f"one; objective {row.name!r} needs it")
    check_used(row, name, given, wanted)


def check_used(row: Preference, name: str, given: object, used: bool) -> None:
    if given is not None and not used:
        raise wrong(name, "one", f"None; objective {row.name!r} has no use for it")


def _weight(name: str, weight: Tensor | None, layout: Layout) -> Tensor | None:
    if weight is None:
        return None
    check_floats(name, weight)
    return layout.flat_tokens(name, weight)


def _labels(desirable: Tensor, layout: Layout) -> Tensor:
    check_tensor("desirable", desirable)
    if desirable.dtype != torch.bool:
        raise wrong("desirable", f"dtype {desirable.dtype}", "torch.bool (desirable.bool() if it holds zeros and ones)")
    return layout.flat_sequences("desirable", desirable, torch.bool)


def _base(row: Preference, kl: Number | None, reward_shift: Number | None, device: torch.device) -> Tensor | None:
    """In the units of a score; a kl is at least 0."""
    if not isinstance(row.link, OfLabels):
        return None
    if row.link.compared == "reward_shift":
        return None if reward_shift is None else _mean("reward_shift", reward_shift, device) / row.link.beta
    if kl is None:
        return torch.zeros((), dtype=torch.float64, device=device)
    return _mean("kl", kl, device).clamp(min=0)


def _mean(name: str, x: Number, device: torch.device) -> Tensor:
    if not isinstance(x, Tensor):
        check_number(name, x)
        return torch.full((), x, dtype=torch.float64, device=device)
    check_constant(name, x)
    if x.dim() > 1 or x.numel() == 0:
        accepted = "a number, a 0-d tensor, or the [K] of other sequences, of which the mean counts"
        raise wrong(name, f"shape {list(x.shape)}", accepted)
    return x.to(device, torch.float64).mean()


def _pair_weight(weight: Tensor, count: int, device: torch.device) -> Tensor:
    check_floats("pair_weight", weight)
    check_constant("pair_weight", weight)
    if weight.shape != (count,) or weight.device != device:
        given = f"{list(weight.shape)} on {weight.device}"
        raise wrong("pair_weight", given, f"[{count}] on {device}, one per loss")
    return as_saved(weight).double().contiguous()


def _nll_mask(nll_mask: Tensor | None, layout: Layout) -> Tensor | None:
    if nll_mask is None:
        return None
    check_tensor("nll_mask", nll_mask)
    if nll_mask.dtype != torch.bool:
        raise wrong("nll_mask", f"dtype {nll_mask.dtype}", "torch.bool (nll_mask.bool() if it holds zeros and ones)")
    return layout.flat_tokens("nll_mask", nll_mask)


def _count(name: str, given: Number | None, layout: Layout) -> Number | None:
    if given is None:
        return None
    return as_count(name, given, 1, torch.zeros((), dtype=torch.float64, device=layout.cu_seqlens.device))


def as_count(name: str, given: Number | None, own: int | Tensor, like: Tensor) -> Number:
    """What a sum is divided by; a tensor is 0-d."""
    if given is None:
        return own
    if isinstance(given, Tensor):
        return as_saved(as_scalar(name, given, like))
    check_number(name, given, above=0)
    return given
