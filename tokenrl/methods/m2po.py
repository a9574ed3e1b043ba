"""M2PO: a bound on the second moment of the log ratios of a batch, as a clip or as a choice of tokens.

    tau = m2po_threshold(logp.detach(), old_logp, advantages, mask=mask)            # the method
    eps_low, eps_high = m2po_bounds(tau, old_logp)
    loss, _ = policy_loss(objective("ppo", eps_low=eps_low, eps_high=eps_high), logp, old_logp, advantages, mask=mask)

    keep = m2po_mask(logp.detach(), old_logp, advantages, mask=mask)                # Trinity-RFT: drops tokens
    loss, _ = policy_loss("ratio", logp, old_logp, advantages, mask=mask, token_weight=keep.to(logp.dtype))

    mask = m2po_mask(old_logp, rollout_logp, mask=mask)                             # AReaL: all tokens

x = logp - old_logp. Where it does harm (A > 0 and x > 0, A < 0 and x < 0) the ratio has gone further than it should.
Both look at the whole of a batch: for one in parts, at all of them. Log-probs are fp32 or fp64, padded [B, T] with a
bool mask, or packed [N] with cu_seqlens [S + 1]; masked cells may hold anything. All is computed in fp64, without
gradient, and nothing waits for the device.

Source: arXiv 2510.01161 (authors' code; trainers, where they are named).
"""

import torch
from torch import Tensor

from ..batch.checks import as_scalar, check_constant, check_floats, check_number
from ..batch.layout import Layout, layout_of

BUDGET = 0.04


def m2po_threshold(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    budget: float = BUDGET,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages_per: str | None = None,
) -> Tensor:
    """float64, 0-d: tau, the largest |x| of a harmful token with mean min(x^2, tau^2) < budget over these tokens; inf
    where their mean x^2 is within the budget, 0 where none is small enough.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, a constant.
        old_logp: of that shape.
        advantages: [B] (or [S]), or one per token; a constant.
        budget: at least 0, in nats squared.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages_per: as for policy_loss.
    """
    _, squares, considered = _squares(logp, old_logp, advantages, mask, cu_seqlens, advantages_per)
    check_number("budget", budget, 0)
    n = considered.sum()
    v = torch.where(considered, squares, torch.inf).sort().values
    place = torch.arange(v.numel(), device=v.device)
    capped = v.cumsum(0) + v * (n - 1 - place)  # sum min(x^2, v), v's own place counted in the first
    within = torch.where((place < n) & (capped < budget * n), v, 0)
    tau = torch.cat([within, within.new_zeros(1)]).amax().sqrt()
    return torch.where(torch.where(considered, squares, 0).sum() <= budget * n, torch.inf, tau)


def m2po_bounds(
    threshold: float | Tensor, like: Tensor, *, least_low: float = 0.3, least_high: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(eps_low, eps_high) = (1 - e^-tau, e^tau - 1), no less than least_low and least_high: of the shape and dtype of
    `like`, one number for all tokens, as parameters of an objective.

    Args:
        threshold: tau, a number or 0-d, in nats.
        like: fp32 or fp64 of the tokens' shape.
        least_low: in [0, 1].
        least_high: at least 0.
    """
    check_floats("like", like)
    check_number("least_low", least_low, 0, 1)
    check_number("least_high", least_high, 0)
    tau = as_scalar("threshold", threshold, like.detach().double())
    low, high = -torch.expm1(-tau), torch.expm1(tau)
    low, high = (bound.to(like.dtype).expand(like.shape) for bound in (low.clamp(least_low), high.clamp(least_high)))
    return low, high


def m2po_mask(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor | None = None,
    *,
    budget: float = BUDGET,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages_per: str | None = None,
) -> Tensor:
    """bool of logp's shape: the valid tokens without the largest x^2 of those that are considered, so many of these
    that the mean of the rest is at most budget. Of equal ones the later in the batch go.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, a constant.
        old_logp: of that shape.
        advantages: [B] (or [S]), or one per token: the harmful tokens are considered, and all of them may go
            (Trinity-RFT, after the final paper); None: all are, and the smallest stays (AReaL).
        budget: at least 0, in nats squared.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages_per: as for policy_loss.
    """
    layout, squares, considered = _squares(logp, old_logp, advantages, mask, cu_seqlens, advantages_per)
    check_number("budget", budget, 0)
    v, order = torch.where(considered, squares, torch.inf).sort(stable=True)
    place = torch.arange(v.numel(), device=v.device)
    kept = (v.cumsum(0) <= budget * (place + 1)) & (place < considered.sum())
    if advantages is None:
        kept |= (place == 0) & considered.any()
    kept = torch.zeros_like(considered).scatter(0, order, kept)
    return (kept | (layout.valid() & ~considered)).view(layout.shape)


def _squares(
    logp: Tensor, old_logp: Tensor, advantages: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
    per: str | None,
) -> tuple[Layout, Tensor, Tensor]:  # fmt: skip
    """(layout, x^2, which of the tokens are considered), flat."""
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    for name, given in (("logp", logp), ("old_logp", old_logp)):
        check_floats(name, given)
        check_constant(name, given)
    x = layout.flat_tokens("logp", logp, torch.float64) - layout.flat_tokens("old_logp", old_logp, torch.float64)
    x, considered = torch.where(layout.valid(), x, 0), layout.valid()
    if advantages is not None:
        check_constant("advantages", advantages)
        a = layout.of_tokens("advantages", advantages, torch.float64, per)
        considered = considered & (a * x > 0)
    return layout, x.square(), considered
