"""AdaKD: token-adaptive distillation; which tokens learn, and at which temperature. Without gradient.

    hard = difficulty(logits, other_logits, mask=mask)                     # h_t, Hellinger's distance
    kept = focused(hard, latf.ratio, mask=mask)                            # the hardest of them
    T = focused_temperature(hard, kept)                                    # hard tokens sharper
    loss, _ = distillation_loss(ADAKD, logits, other_logits, mask=kept, temperature=T)
    latf.update(loss)

Tensors are [B, T] with a bool mask; all valid tokens of a call are one pool, as in the authors' micro-batch. The
authors' code lets a small gradient flow through h_t; here, as their text has it, temperature and choice are constants.

Source: arXiv 2510.11615 (authors' code).
"""

import torch
from torch import Tensor

from ..batch.checks import check_number
from ..batch.ranks import places
from ..batch.spans import Spans
from ..errors import wrong
from ..logprobs.divergence import token_divergence
from ..objectives.distillation import distillation

ADAKD = distillation("reverse_kd", power=2.0)


def difficulty(logits: Tensor, other_logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """h_t = sqrt(1 - sum sqrt(p r)), Hellinger's distance of student and teacher, [B, T], in [0, 1]; 0 where masked.

    Args:
        logits: the student's, bf16, fp16, fp32 or fp64 [B, T, V]; no gradient passes.
        other_logits: the teacher's, of the same shape and dtype.
        mask: bool [B, T].
    """
    found = token_divergence(logits.detach(), other_logits.detach(), "squared_hellinger", row_mask=mask)
    assert isinstance(found, Tensor)
    return found.clamp(min=0).sqrt()


def focused(score: Tensor, ratio: float, *, mask: Tensor) -> Tensor:
    """bool of score's shape: the floor(ratio N) of the N valid tokens with the highest scores, at least one of them; of
    equal scores the first.

    Args:
        score: floats [B, T], such as difficulty.
        ratio: in [0, 1], of LossAdaptiveFocus.
        mask: bool of that shape.
    """
    check_number("ratio", ratio, 0.0)
    if ratio > 1:
        raise wrong("ratio", ratio, "a number from 0 to 1")
    _check(score, mask)
    everyone = Spans(torch.zeros_like(mask, dtype=torch.int64).flatten(), mask.flatten(), 1)
    count = (ratio * mask.sum()).floor().clamp(min=1)
    return (places(score.flatten(), everyone) < count).view(score.shape) & mask


def focused_temperature(
    score: Tensor, kept: Tensor, *, base: float = 1.0, scale: float = 0.5, soften: bool = False
) -> Tensor:
    """T_t = base e^(-scale tanh log(h_t / median)), of the lower median of the kept tokens; 1 for the others.

    Args:
        score: h_t, floats [B, T].
        kept: bool of that shape.
        base: above 0.
        scale: 0.5 in the authors' scripts, 0.6 by their default.
        soften: hard tokens softer instead, the sign turned.
    """
    check_number("base", base, above=0)
    check_number("scale", scale)
    _check(score, kept)
    middle = torch.where(kept, score, torch.nan).nanmedian()
    square = (score / middle).clamp(min=1e-8).square()
    bent = (square - 1) / (square + 1)  # tanh log x
    return torch.where(kept, base * ((scale if soften else -scale) * bent).exp(), 1.0)


def _check(score: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != score.shape:
        raise wrong("mask", f"{mask.dtype} {list(mask.shape)}", f"bool {list(score.shape)}")


class LossAdaptiveFocus:
    """LATF, the controller of the share of tokens that learn: more where the loss rises, fewer where it falls.

    ema = decay ema + (1 - decay) loss of each update, the first loss to begin with. After the first `begin` updates,
    with ref the ema of the last change: where ema leaves ref (1 +- tolerance) the ratio grows or shrinks by `step`,
    within [least, 1], and ref follows. state_dict, load_state_dict: as of an optimizer.
    """

    def __init__(
        self, *, tolerance: float = 0.05, step: float = 0.05, decay: float = 0.99, begin: int = 0, least: float = 0.1
    ):
        for name, value in (("tolerance", tolerance), ("step", step), ("decay", decay), ("least", least)):
            check_number(name, value, 0.0)
        self.tolerance, self.step, self.decay, self.begin, self.least = tolerance, step, decay, begin, least
        self.ratio, self.updates = 1.0, 0
        self.ema: float | None = None
        self.reference: float | None = None

    def update(self, loss: float | Tensor) -> float:
        """The ratio for the next batch. loss: of this one, the mean over processes; a tensor is one host sync."""
        loss = float(loss)
        self.ema = loss if self.ema is None else self.decay * self.ema + (1 - self.decay) * loss
        self.updates += 1
        if self.reference is None:
            self.reference = self.ema if self.updates > self.begin else None
            return self.ratio
        fallen, margin = self.reference - self.ema, self.tolerance * self.reference
        if fallen < -margin:
            self.ratio, self.reference = min(self.ratio * (1 + self.step), 1.0), self.ema
        elif fallen > margin:
            self.ratio, self.reference = max(self.ratio * (1 - self.step), self.least), self.ema
        return self.ratio

    def state_dict(self) -> dict[str, float | None]:
        return {name: getattr(self, name) for name in ("ratio", "updates", "ema", "reference")}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])
