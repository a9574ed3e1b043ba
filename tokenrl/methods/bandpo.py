"""BandPO: bounds of the ratio per token from a trust region, without gradient, for the objectives' parameters.

    eps_low, eps_high = bandpo(old_logp, mask=mask)
    policy_loss(objective("ppo", eps_low=eps_low, eps_high=eps_high), ...)

The clip is to [1 - eps_low, 1 + eps_high]. Tensors are padded [B, T] with a bool mask, or packed [N] with cu_seqlens
[S + 1]; results have that shape, and are 0 in masked cells, which may hold anything. All is computed in fp64.

Source: BandPO (authors' code).
"""

import math

import torch
from torch import Tensor

from ..batch.checks import FINITE, check_name, check_number
from ..batch.valid_tokens import valid_of

KINDS = ("tv", "chi2", "kl")
EDGE = 1e-6
HALVINGS = 60


def bandpo(
    old_logp: Tensor,
    *,
    kind: str = "kl",
    delta: float = 0.05,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    relax: bool = True,
    ceiling: float = 100.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(eps_low, eps_high) of old_logp's shape and dtype: ratios that stay in a trust region of size delta.

    The token's probability moves from p to r p and all others scale alike, which changes the distribution by
        kind "tv"    p |r - 1|                                        eps = delta / p
        kind "chi2"  (r - 1)^2 p / (1 - p)                            eps = sqrt(delta (1 - p) / p)
        kind "kl"    -p log r - (1 - p) log((1 - r p) / (1 - p))      by bisection
    at most delta, r in [0, 1 / p]. The authors' limits (eps_low, eps_high) at the ends: (1, 1 / p - 1) below p = 1e-6,
    and above 1 - 1e-6 (delta, 0), (0, 0), (1 - e^-delta, 0) for the three kinds.
    NaN stays.

    Args:
        old_logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, a constant.
        kind: "tv", "chi2" or "kl", the code's default.
        delta: above 0, in the units of the divergence.
        eps_low: in [0, 1], at least so wide is the window under relax.
        eps_high: at least 0, likewise.
        relax: whether the window is at least that of a plain clip, eps_low and eps_high.
        ceiling: at least 1, at most so large is 1 + eps_high.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
    """
    check_name("kind", kind, KINDS)
    check_number("delta", delta, above=0, most=FINITE, accepted="a positive number")
    check_number("eps_low", eps_low, 0, 1)
    check_number("eps_high", eps_high, 0)
    check_number("ceiling", ceiling, 1)
    valid = valid_of(old_logp, mask, cu_seqlens, "old_logp")
    logp = valid.take("old_logp", old_logp)
    low, high = _band(kind, delta, logp.exp(), -logp.expm1())
    if relax:
        low, high = low.clamp(min=eps_low), high.clamp(min=eps_high)
    high = high.clamp(max=ceiling - 1)
    low, high = (torch.where(logp.isnan(), logp, x) for x in (low, high))
    return valid.put(low, old_logp.dtype), valid.put(high, old_logp.dtype)


def _band(kind: str, delta: float, p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - lowest ratio, highest ratio - 1) of tokens of probability p = 1 - rest."""
    if kind == "tv":
        low = high = delta / p
        sure = min(delta, 1.0)
    elif kind == "chi2":
        low = high = (delta * rest / p).sqrt()
        sure = 0.0
    else:
        low, high = _kl_share(rest, p, delta), _kl_share(p, rest, delta) * rest / p
        sure = -math.expm1(-delta)
    low, high = low.clamp(max=1), torch.minimum(high, rest / p)
    low = torch.where(p < EDGE, 1.0, torch.where(rest < EDGE, sure, low))
    return low, torch.where(p < EDGE, 1 / p.clamp(min=1e-12) - 1, torch.where(rest < EDGE, 0.0, high))


def _kl_share(p: Tensor, rest: Tensor, delta: float) -> Tensor:
    """The v in [0, 1] where taking the share v of what the others hold, rest = 1 - p, costs a KL of delta."""
    low, high = torch.zeros_like(p), torch.ones_like(p)
    for _ in range(HALVINGS):
        v = (low + high) / 2
        inside = -p * (v * rest / p).log1p() - rest * (-v).log1p() < delta
        low, high = torch.where(inside, v, low), torch.where(inside, high, v)
    return (low + high) / 2
