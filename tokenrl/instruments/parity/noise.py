"""How far a precision errs in log-probs, what a loss makes of that, and which tokens' gradients it decides.

The reference's own error in a precision is one sample of it: another way to compute the same errs as far, elsewhere and
with another sign, and over a long prefix the errors add up to something else. So a loss is evaluated at several
log-probs that err alike, and of these the farthest from the exact ones counts, token by token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .computation import Computation, Evaluated, evaluated
from .tolerance import ULPS

SMOOTH = 1e-3  # of log ratios: the farthest that a loss is moved to see whether it is smooth
SHUFFLES = 5


@dataclass(frozen=True)
class Undecided:
    """Tokens whose gradient rounding decides, since they are at a clip edge or another jump: bool of the tokens' shape;
    and by how much the loss jumps there."""

    tokens: Tensor
    jump: float

    @property
    def count(self) -> int:
        return int(self.tokens.sum())


def noisy(exact: Computation, s: Tensor, errors: Sequence[Tensor], eps: float) -> Iterator[Tensor]:
    """Log-probs, fp64 of the tokens' shape, that err as those of `errors` (fp64, of that shape) do: by these, by the
    same of other tokens, and with the other sign; beside that by what rounding the statistic s, [N], takes, as each
    step of a sum does."""
    valid, logp = exact.layout.valid(), exact.logp.detach().double().flatten()
    largest = torch.stack([error.double().flatten() for error in errors])
    error = largest.gather(0, largest.abs().nan_to_num(0).argmax(0, keepdim=True)).squeeze(0)[valid].nan_to_num(0)
    size = eps / 2 * s.abs()[valid].nan_to_num(0, 0, 0)
    generator = torch.Generator().manual_seed(0)
    for shuffle in range(SHUFFLES):
        order = torch.randperm(len(error), generator=generator)
        signs = torch.randint(0, 2, error.shape, generator=generator, dtype=torch.int8) * 2.0 - 1
        for sign in (1, -1):
            moved = sign * ((error[order] if shuffle else error) + signs * size)
            yield logp.masked_scatter(valid, logp[valid] + moved).view(exact.logp.shape)


def farthest(truth: Evaluated, others: Sequence[Evaluated], sums: float) -> Evaluated:
    """Of each term and each token what is farthest from the truth, in fp64. sums: how far, of each, sums of gradients
    and of terms err beside that."""

    def of(exact: Tensor, found: Sequence[Tensor]) -> Tensor:
        apart = torch.stack([x.double() - exact for x in found])
        size = apart.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        apart = apart.gather(0, size.argmax(0, keepdim=True)).squeeze(0)
        return exact + apart + torch.copysign(sums * exact.abs(), apart)

    by_entropy = truth.by_entropy
    if by_entropy is not None:
        by_entropy = of(by_entropy, [x.by_entropy for x in others if x.by_entropy is not None])
    terms, by_logp = of(truth.terms, [x.terms for x in others]), of(truth.by_logp, [x.by_logp for x in others])
    return replace(others[0], terms=terms, by_logp=by_logp, by_entropy=by_entropy)


def undecided(exact: Computation, truth: Evaluated, others: Sequence[Evaluated], eps: float) -> Undecided:
    """By moving the statistic of each token as far as that of the others is from the truth's, and a little farther.

    A bound that holds at one end and not at the other is in between. What else jumps is seen in the gradient: from two
    second differences what is smooth goes out, but for the fourth order of a small step.
    """
    valid = exact.layout.valid()
    tokens, old = valid.view(exact.layout.shape), exact.batch.tensors.get("old_logp")
    if old is None or not valid.any():
        return Undecided(torch.zeros_like(tokens), 0.0)
    seen = truth.seen
    apart = torch.stack([other.seen.s.double() - seen.s for other in others]).nan_to_num(0, 0, 0).abs()
    size = max(exact.logp.flatten()[valid].abs().max().item(), seen.s[valid].abs().max().item(), 1.0)
    # A token's own, and no less than is usual: of few samples all may be near by chance.
    steps = 2 * apart.amax(0).clamp(min=apart[:, valid].mean()) + ULPS * eps * size
    ends = [seen.clipped(shift) for shift in (-steps, steps)]
    between = (ends[0] != ends[1]).any(0).view(tokens.shape)
    jump, jumps = _jumps(exact, min(steps[valid].max().item(), SMOOTH))
    largest = torch.where(tokens, truth.by_logp, 0).abs().max()
    return Undecided(tokens & (between | (jumps.abs() > ULPS * eps * largest)), jump.abs().item())


def _jumps(exact: Computation, step: float) -> tuple[Tensor, Tensor]:
    """Of the loss, and of each token's gradient: what is in the way of a fourth order."""
    old, moving, found = exact.batch.tensors["old_logp"], _moving(exact), {}
    for share in (-2, -1, 0, 1, 2):
        at = evaluated(exact.changed(old_logp=old - share * step / 2 * moving))
        found[share] = (at.value, at.by_logp)

    def second(x: list[Tensor]) -> Tensor:
        return x[0] - 2 * x[1] + x[2]

    far, near = ([second([found[at][i] for at in (-by, 0, by)]) for i in (0, 1)] for by in (2, 1))
    (of_loss, of_tokens) = (a - 4 * b for a, b in zip(far, near, strict=True))
    return torch.maximum(of_loss.abs(), far[0].abs()), of_tokens


def _moving(exact: Computation) -> Tensor:
    """Whose log ratios move so that every token's statistic does: of a sum the first ones, else all."""
    if not exact.row.statistic.endswith("_sum"):
        return torch.ones_like(exact.logp)
    first = (exact.positions() == 1) & exact.layout.valid()
    return first.view(exact.logp.shape).to(exact.logp.dtype)
