"""THE table of divergences between two distributions over the vocabulary: p of the trained head, r of another one.

Each is a sum over the vocabulary of f(log p_v, log r_v), 0 log 0 = 0, infinite where f is. With z the logits of p:

    d f / d z_v = a_v - p_v sum_k a_k,   a_v = p_v df/dp_v

and likewise for r. Here is f in torch, its derivative autograd's; a is written by hand beside it in csrc/divergences.h
and triton_kernels/divergences.py. D(x || y) = sum x (log x - log y).
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..batch.checks import check_name, check_number
from ..errors import described, unknown, wrong
from .gates.base import parametrised


@parametrised
class Divergence:
    """Base of all divergences. `name` finds the kernels' functor; its parameters are numbers, in the functor's order.
    source: where it was read. below: parameters are above 0 and below this."""

    name: ClassVar[str]
    source: ClassVar[str]
    below: ClassVar[float] = 1.0
    names: ClassVar[tuple[str, ...]]
    __dataclass_fields__: ClassVar[dict[str, Any]]  # as dataclasses.replace asks for, to type checkers

    def params(self) -> list[float]:
        return [float(getattr(self, name)) for name in self.names]

    def terms(self, log_p: Tensor, log_r: Tensor) -> Tensor:
        """f of each entry of the vocabulary."""
        raise TypeError(f"{type(self).__name__} is no divergence: it defines no terms")


def _weighed(weight: Tensor, log_weight: Tensor, other: Tensor) -> Tensor:
    """weight (log_weight - other), 0 with its gradient where the weight is."""
    some = weight > 0
    return weight * (torch.where(some, log_weight, 0) - torch.where(some, other, 0))


def _mixed(p: Tensor, r: Tensor, share: float) -> Tensor:
    """log((1 - share) p + share r), 0 where both are 0."""
    m = (1 - share) * p + share * r
    return torch.where(m > 0, m, 1).log()


@parametrised
class ForwardKl(Divergence):
    """D(r || p), of a teacher r to a student p: covers all that the teacher does."""

    name = "forward_kl"
    source = "Hinton et al. 2015"

    def terms(self, log_p: Tensor, log_r: Tensor) -> Tensor:
        return _weighed(log_r.exp(), log_r, log_p)


@parametrised
class ReverseKl(Divergence):
    """D(p || r), of a student p to a teacher r: seeks the teacher's modes."""

    name = "reverse_kl"
    source = "MiniLLM, arXiv 2306.08543"

    def terms(self, log_p: Tensor, log_r: Tensor) -> Tensor:
        return _weighed(log_p.exp(), log_p, log_r)


@parametrised
class CrossEntropy(Divergence):
    """-sum r log p: D(r || p) and the entropy of r."""

    name = "cross_entropy"
    source = "Hinton et al. 2015"

    def terms(self, log_p: Tensor, log_r: Tensor) -> Tensor:
        return _weighed(log_r.exp(), torch.zeros_like(log_r), log_p)


@parametrised
class Jsd(Divergence):
    """beta D(r || m) + (1 - beta) D(p || m), m = (1 - beta) p + beta r, 0 < beta < 1. Divided by beta it tends to
    D(r || p) as beta falls to 0, by 1 - beta to D(p || r) as it rises to 1: what TRL computes at these ends."""

    name = "jsd"
    source = "GKD, arXiv 2306.13649, in TRL's orientation"
    beta: float = 0.5

    def terms(self, log_p: Tensor, log_r: Tensor) -> Tensor:
        p, r = log_p.exp(), log_r.exp()
        log_m = _mixed(p, r, self.beta)
        return self.beta * _weighed(r, log_r, log_m) + (1 - self.beta) * _weighed(p, log_p, log_m)


@parametrised
class SkewForwardKl(Divergence):
    """D(r || share r + (1 - share) p)."""

    name = "skew_forward_kl"
    source = "DistiLLM, arXiv 2402.03898"
    share: float = 0.1

    def terms(self, log_p: Tensor, log_r: Tensor) -> Tensor:
        p, r = log_p.exp(), log_r.exp()
        return _weighed(r, log_r, _mixed(p, r, self.share))


@parametrised
class SkewReverseKl(Divergence):
    """D(p || share p + (1 - share) r)."""

    name = "skew_reverse_kl"
    source = "DistiLLM, arXiv 2402.03898"
    share: float = 0.1

    def terms(self, log_p: Tensor, log_r: Tensor) -> Tensor:
        p, r = log_p.exp(), log_r.exp()
        return _weighed(p, log_p, _mixed(p, r, 1 - self.share))


@parametrised
class TotalVariation(Divergence):
    """sum |p - r| / 2."""

    name = "total_variation"
    source = "AlignDistil, arXiv 2503.02832, whose tvd is twice this"

    def terms(self, log_p: Tensor, log_r: Tensor) -> Tensor:
        return (log_p.exp() - log_r.exp()).abs() / 2


@parametrised
class Bhattacharyya(Divergence):
    """sum sqrt(p r), the coefficient: 1 where p = r."""

    name = "bhattacharyya"
    source = "Bhattacharyya 1943"

    def terms(self, log_p: Tensor, log_r: Tensor) -> Tensor:
        some = (log_p > -torch.inf) & (log_r > -torch.inf)
        return torch.where(some, (torch.where(some, log_p + log_r, 0) / 2).exp(), 0)


@parametrised
class SquaredHellinger(Divergence):
    """sum (sqrt p - sqrt r)^2 / 2 = 1 - sum sqrt(p r), without its cancellation; Hellinger's distance is its root."""

    name = "squared_hellinger"
    source = "AdaKD, arXiv 2510.11615"

    def terms(self, log_p: Tensor, log_r: Tensor) -> Tensor:
        return ((log_p / 2).exp() - (log_r / 2).exp()).square() / 2


@parametrised
class AlphaBeta(Divergence):
    """-1 / (alpha beta) sum [r^alpha p^beta - alpha / (alpha + beta) r^(alpha + beta) - beta / (alpha + beta) p^(alpha
    + beta)], alpha, beta > 0."""

    name = "alpha_beta"
    source = "ABKD, arXiv 2505.04560, as in AdaKD's code"
    below = float("inf")
    alpha: float = 0.2
    beta: float = 0.7

    def terms(self, log_p: Tensor, log_r: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        some = (log_p > -torch.inf) & (log_r > -torch.inf)
        both = torch.where(some, torch.where(some, a * log_r + b * log_p, 0).exp(), 0)
        return (a / (a + b) * ((a + b) * log_r).exp() + b / (a + b) * ((a + b) * log_p).exp() - both) / (a * b)


DIVERGENCES: dict[str, type[Divergence]] = {
    kind.name: kind
    for kind in (
        ForwardKl, ReverseKl, CrossEntropy, Jsd, SkewForwardKl, SkewReverseKl, TotalVariation, Bhattacharyya,
        SquaredHellinger, AlphaBeta,
    )
}  # fmt: skip


def divergence(kind: str | Divergence, **parameters: float) -> Divergence:
    """A row of the table, with any of its parameters changed: divergence("jsd", beta=0.9).

    Args:
        kind: of tokenrl.DIVERGENCES, or a row.
        parameters: numbers above 0 and below the row's bound.

    Raises:
        ValueError: for an unknown name, naming the nearest, and for a number out of range.
    """
    if isinstance(kind, Divergence):
        row = kind
    else:
        if not isinstance(kind, str):
            raise wrong("kind", described(kind), "a name of tokenrl.DIVERGENCES, or what tokenrl.divergence returns")
        check_name("kind", kind, DIVERGENCES)
        row = DIVERGENCES[kind]()
    for name, value in parameters.items():
        if name not in row.names:
            raise unknown(f"parameter of {row.name!r}", name, row.names)
        accepted = f"a number above 0 and below {row.below:g}"
        check_number(name, value, above=0, accepted=accepted)
        if value >= row.below:
            raise wrong(name, value, accepted)
    return dataclasses.replace(row, **parameters) if parameters else row
