"""DHPO's weight of the token ratio against the sequence ratio."""

from torch import Tensor

from ..batch.checks import check_number
from ..batch.groups import Groups
from ..batch.valid_tokens import per_token, valid_of


def entropy_mix(
    entropy: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    lowest: float | Tensor | None = None,
    highest: float | Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """w_t = (H_t - H_min) / (H_max - H_min + eps), in [0, 1]: of entropy's shape and dtype, without gradient.

    The source has a min-max normalised entropy without gradient. That the extremes are those of the valid tokens of the
    response, that a high entropy gives the weight to the token ratio (1 - entropy_mix has it the other way round) and
    eps are our reading. A response of equal entropies has weight 0, masked cells too.

    Args:
        entropy: fp32 or fp64 [B, T], or [N] with cu_seqlens, in nats, a constant.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        lowest: H_min in place of the response's own, a number, 0-d, or one per sequence [S] (of whole responses, where
            they come in parts); weights outside are cut to [0, 1].
        highest: H_max, likewise.
        eps: at least 0.

    Source: DHPO, arXiv 2601.05607 (notes, our reading).
    """
    check_number("eps", eps, 0)
    valid = valid_of(entropy, mask, cu_seqlens, "entropy")
    x, rows = valid.take("entropy", entropy), Groups(valid.row, valid.layout.num_sequences)
    low = -rows.max(-x) if lowest is None else per_token("lowest", lowest, valid)
    high = rows.max(x) if highest is None else per_token("highest", highest, valid)
    return valid.put(((x - low) / (high - low + eps)).clamp(0, 1), entropy.dtype)
