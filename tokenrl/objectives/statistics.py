"""The statistics in torch: which tokens' log ratios make up the s of one token.

Each takes x, the log ratios [spans, length] with zeros in masked cells, mask of the same shape, and t, the 1-based
count of
valid tokens; each is linear in x except the minima. A span is a sequence, or a segment inside one: only the boundaries
differ.

flow says what a gradient sees: "through" is the true derivative, "local" stops it in all tokens but the own one
(value s_t, derivative 1 with respect to the own logp: the form of CTPO and GSPO-token).
"""

import torch
from torch import Tensor

from ..batch.checks import check_name


def token(x: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    """s_t = x_t"""
    return x


def prefix_sum(x: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    """s_t = sum_{j <= t} x_j"""
    return x.cumsum(1)


def prefix_mean(x: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    """s_t = (1 / t) sum_{j <= t} x_j"""
    return x.cumsum(1) / t.clamp(min=1)


def _least_before(x: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    lowest = torch.where(mask, x, torch.inf).detach().cummin(1).values
    before = torch.cat([torch.full_like(lowest[:, :1], torch.inf), lowest[:, :-1]], 1)
    return torch.where(t > 1, before, 0)


def prefix_min(x: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    """s_t = sg[min_{j < t} x_j] + x_t; the minimum of nothing is 0, so the first valid token keeps its own ratio."""
    return _least_before(x, mask, t) + x


def prefix_min_capped(x: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    """s_t = min(0, sg[min_{j < t} x_j]) + x_t: a prefix only ever lowers the ratio."""
    return _least_before(x, mask, t).clamp(max=0) + x


def span_sum(x: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    """s_t = sum_j x_j, the same for every token of the span"""
    return x.sum(1, keepdim=True).expand_as(x)


def span_mean(x: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    """s_t = (1 / n) sum_j x_j over the span's n valid tokens"""
    return (x.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(x)


STATISTICS = {
    f.__name__: f for f in (token, prefix_sum, prefix_mean, prefix_min, prefix_min_capped, span_sum, span_mean)
}

FLOWS = {  # a token has no other token to stop at; the prefix minimum is always detached
    "token": ("through",),
    "prefix_sum": ("local", "through"),
    "prefix_mean": ("local", "through"),
    "prefix_min": ("local",),
    "prefix_min_capped": ("local",),
    "span_sum": ("local", "through"),
    "span_mean": ("local", "through"),
}


def check_statistic(statistic: str, flow: str) -> None:
    check_name("statistic", statistic, FLOWS)
    check_name(f"flow of statistic {statistic!r}", flow, FLOWS[statistic])
