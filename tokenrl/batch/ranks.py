"""Places of tokens in the order of a score within their span, and how many of a span's tokens a share is."""

import torch
from torch import Tensor

from .checks import check_name, check_number
from .spans import Spans

ROUNDINGS = ("ceil", "floor")


def places(score: Tensor, spans: Spans) -> Tensor:
    """int64 [N]: 0 for the valid token of a span with the highest score; of equal scores the first token comes first,
    and masked cells, which may hold anything, after all valid ones. No host sync."""
    order = torch.where(spans.valid, score, 0).argsort(descending=True, stable=True)
    key = 2 * spans.index + ~spans.valid
    order = order[key[order].argsort(stable=True)]
    cells = torch.arange(order.numel(), device=order.device)
    sizes = torch.zeros(spans.number, dtype=torch.int64, device=order.device).index_add_(
        0, spans.index, torch.ones_like(cells)
    )
    first = (sizes.cumsum(0) - sizes)[spans.index[order]]
    return torch.empty_like(order).scatter_(0, order, cells - first)


def share_counts(share: float, counts: Tensor, rounding: str) -> Tensor:
    """How many `share` of each of the counts is, rounded; "floor": at least one. A rounding error of the product is
    none of its own: 0.7 of 10 are 7, 0.29 of 100 are 29."""
    check_name("rounding", rounding, ROUNDINGS)
    check_number("share", share, most=1, above=0, accepted="the fraction of tokens to keep, above 0 and at most 1")
    product = share * counts
    return (product - 1e-9).ceil() if rounding == "ceil" else (product + 1e-9).floor().clamp(min=1)
