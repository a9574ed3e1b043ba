"""D3S, which rollouts and which of their tokens to train on, without gradient.

    rows = max_variance_rollouts(advantages, round(d3s_schedule(progress, n_first, n_last)))
    mask = mask & rows[:, None]
    mask = advantage_entropy_mask(advantages, entropy, d3s_schedule(progress, k_first, k_last), mask=mask)

The advantages stay those of their whole groups, as computed before the selection. The result is the loss's mask, so
that a token-mean counts the kept tokens only. Tensors are padded [B, T] with a bool mask, or packed [N] with cu_seqlens
[S + 1]; masked cells may hold anything. The paper's numbers of rollouts and tokens are not known to us: they have no
defaults.

Source: arXiv 2509.22115 (notes).
"""

import torch
from torch import Tensor

from ..batch.checks import as_rewards, as_scalar, check_constant, check_name, check_number
from ..batch.valid_tokens import ValidTokens, valid_of
from ..errors import wrong
from .sspo import SCOPES

TIE = 1e-12


def d3s_schedule(progress: float, initial: float, final: float) -> float:
    """(1 - p) initial + p final: the number of rollouts or the fraction of tokens at progress p in [0, 1] of the
    training.

    Args:
        progress: p, in [0, 1].
        initial: the number at its beginning.
        final: the number at its end.
    """
    check_number("progress", progress, 0, 1)
    check_number("initial", initial)
    check_number("final", final)
    return (1 - progress) * initial + progress * final


def max_variance_rollouts(advantages: Tensor, keep: int) -> Tensor:
    """bool [S]: the `keep` rollouts of the batch whose advantages [S] have the largest variance, exactly.

    They are the k largest and the keep - k smallest for one k; all k are tried on sums of the sorted advantages. Of the
    k whose variances agree to 1e-12 the largest is taken; of equal advantages the smaller ones are counted from the
    first row on and the larger ones from the last row on (our reading).

    Args:
        advantages: fp32 or fp64 [S], finite, a constant.
        keep: an integer from 0 to S.
    """
    x = as_rewards(advantages, name="advantages")
    if not isinstance(keep, int) or not 0 <= keep <= x.numel():
        raise wrong("keep", keep, f"an integer from 0 to the number of rollouts, {x.numel()}")
    if not x.isfinite().all():
        raise wrong("advantages", "values that are not finite", "finite advantages")
    if keep == 0:
        return torch.zeros_like(x, dtype=torch.bool)
    ordered, order = x.sort(stable=True)
    # Around their mean the sums of squares lose nothing to a common offset.
    centred = ordered - x.mean()
    k = torch.arange(keep + 1, device=x.device)
    total, squares = (_both_ends(y, keep) for y in (centred, centred.square()))
    variance = squares / keep - (total / keep).square()
    large = torch.where(variance >= variance.amax() - TIE * centred.square().mean(), k, -1).amax()
    place = torch.arange(x.numel(), device=x.device)
    chosen = torch.zeros_like(place, dtype=torch.bool)
    chosen[order] = (place < keep - large) | (place >= x.numel() - large)
    return chosen


def _both_ends(x: Tensor, keep: int) -> Tensor:
    """[keep + 1]: for k = 0 .. keep, the sum of the first keep - k of x and the last k."""
    zero = x.new_zeros(1)
    first = torch.cat([zero, x[:keep].cumsum(0)])
    last = torch.cat([zero, x.flip(0)[:keep].cumsum(0)])
    return first.flip(0) + last


def advantage_entropy_threshold(
    advantages: Tensor,
    entropy: Tensor,
    fraction: float,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages_per: str | None = None,
) -> Tensor:
    """float64, 0-d: what |A| H reaches in the fraction of the valid tokens that advantage_entropy_mask keeps; inf if
    none is valid. For a batch in parts: of all parts.

    Args:
        advantages: [B] (or [S]), or one per token; a constant.
        entropy: fp32 or fp64 [B, T], or [N] with cu_seqlens, in nats.
        fraction: above 0, at most 1.
        mask: bool of that shape: the tokens of the selected rollouts.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages_per: as for policy_loss.
    """
    valid, scores = _scores(advantages, entropy, mask, cu_seqlens, advantages_per)
    return _thresholds(scores, torch.zeros_like(valid.row), 1, fraction)[0]


def advantage_entropy_mask(
    advantages: Tensor,
    entropy: Tensor,
    fraction: float | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages_per: str | None = None,
    scope: str = "batch",
    threshold: float | Tensor | None = None,
) -> Tensor:
    """bool of entropy's shape: the top fraction of the valid tokens by |A| H, False in masked cells. Of n tokens
    floor(1 + fraction (n - 1)) are kept, and what ties with the last of them, as corrections.top_entropy_mask does (our
    reading).

    Args:
        advantages: [B] (or [S]), or one per token; a constant.
        entropy: fp32 or fp64 [B, T], or [N] with cu_seqlens, of the whole vocabulary, of the logits at the temperature
            of the loss or without it (our reading).
        fraction: above 0, at most 1; None with a threshold.
        mask: bool of that shape: the tokens of the selected rollouts.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages_per: as for policy_loss.
        scope: the tokens are compared within the "batch" (all selected rollouts) or within their "sequence"; the source
            can be read both ways.
        threshold: a number or 0-d tensor in place of fraction, for scope "batch": advantage_entropy_threshold of the
            whole of a batch that comes in parts.
    """
    check_name("scope", scope, SCOPES)
    if (threshold is None) == (fraction is None):
        raise wrong("fraction", fraction, "a fraction, or a threshold in its place")
    valid, scores = _scores(advantages, entropy, mask, cu_seqlens, advantages_per)
    if threshold is not None:
        if scope != "batch":
            raise wrong("threshold", threshold, f"None for scope {scope!r} (scope='batch' uses it)")
        kept = scores >= as_scalar("threshold", threshold, scores)
    else:
        assert fraction is not None
        within = valid.row if scope == "sequence" else torch.zeros_like(valid.row)
        kept = scores >= _thresholds(scores, within, valid.layout.num_sequences, fraction)[within]
    return valid.put(kept, torch.bool)


def _scores(
    advantages: Tensor, entropy: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, per: str | None
) -> tuple[ValidTokens, Tensor]:
    """The valid tokens and their |A| H."""
    valid = valid_of(entropy, mask, cu_seqlens, "entropy")
    check_constant("advantages", advantages)
    own = valid.layout.of_tokens("advantages", advantages, torch.float64, per)[valid.cells]
    return valid, own.abs() * valid.take("entropy", entropy)


def _thresholds(scores: Tensor, within: Tensor, number: int, fraction: float) -> Tensor:
    """[number]: the lowest of the kept scores of each span that `within` names; inf if there are no scores."""
    accepted = "the fraction of tokens to keep, above 0 and at most 1"
    check_number("fraction", fraction, most=1, above=0, accepted=accepted)
    ordered, order = scores.sort()
    ordered = ordered[within[order].sort(stable=True).indices]
    ends = torch.bincount(within, minlength=number).cumsum(0)
    counts = ends.diff(prepend=ends.new_zeros(1))
    # 0.29 * 100 is a little less than 29: a count a rounding error below an integer would drop a token.
    kept = (1 + fraction * (counts - 1).double() + 1e-9).floor().long()
    return torch.cat([ordered, ordered.new_full((1,), torch.inf)])[ends - kept]
