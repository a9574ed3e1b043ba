"""The 80/20 rule: the tokens of the highest entropy, without gradient."""

import torch
from torch import Tensor

from ..batch.checks import as_scalar, check_constant, check_floats, check_number, check_tensor
from ..batch.layout import layout_of
from ..errors import wrong


def entropy_threshold(entropy: Tensor, quantile: float, mask: Tensor | None = None) -> Tensor:
    """float64, 0-d: what the entropies of the fraction `quantile` of the valid tokens reach; inf if none is valid.

    The (1 - quantile) quantile, interpolated linearly between neighbours, as torch.quantile does (which takes 2^24
    numbers at most). For a batch in parts: of all parts.

    Args:
        entropy: fp32 or fp64 of any shape, in nats, a constant.
        quantile: above 0, at most 1.
        mask: bool of that shape.
    """
    check_floats("entropy", entropy)
    check_constant("entropy", entropy)
    accepted = "the fraction of tokens to keep, above 0 and at most 1"
    check_number("quantile", quantile, most=1, above=0, accepted=accepted)
    if mask is None:
        mask = torch.ones_like(entropy, dtype=torch.bool)
    check_tensor("mask", mask)
    if mask.dtype != torch.bool or mask.shape != entropy.shape:
        raise wrong("mask", f"{mask.dtype} {list(mask.shape)}", f"torch.bool {list(entropy.shape)}")
    # Infinity after the last entropy: what an empty batch finds, and what lets the masked cells stay, without a sync.
    ordered = torch.where(mask, entropy.double(), torch.inf).reshape(-1).sort().values
    ordered = torch.cat([ordered, ordered.new_full((1,), torch.inf)])
    last = (mask.sum() - 1).clamp(min=0)
    place = (1 - quantile) * last.double()
    # 1 - 0.7 is not 0.3: a place a rounding error above a token would drop it.
    place = torch.where((place - place.round()).abs() < 1e-9, place.round(), place)
    below = place.floor().long()
    low, high = ordered[below], ordered[torch.minimum(below + 1, last)]
    return torch.where(place == below, low, low + (place - below) * (high - low))


def top_entropy_mask(
    entropy: Tensor,
    *,
    quantile: float = 0.2,
    threshold: float | Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """bool of entropy's shape: the valid tokens with entropy >= threshold, the 80/20 rule. The other tokens get weight
    0 and stay in the count that the loss is divided by.

    Args:
        entropy: fp32 or fp64 [B, T], or [N] with cu_seqlens, in nats, a constant.
        quantile: the fraction of the batch's valid tokens to keep, those of the highest entropy (ties are all kept).
        threshold: a number or 0-d tensor in its place, entropy_threshold of the whole of a batch that comes in parts.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.

    Source: arXiv 2506.01939, TRL (trainers).
    """
    layout = layout_of(entropy, mask=mask, cu_seqlens=cu_seqlens, name="entropy")
    check_floats("entropy", entropy)
    check_constant("entropy", entropy)
    if threshold is None:
        threshold = entropy_threshold(entropy, quantile, mask)
    flat = layout.flat_tokens("entropy", entropy, torch.float64)
    threshold = as_scalar("threshold", threshold, flat)
    return ((flat >= threshold) & layout.valid()).view(layout.shape)
