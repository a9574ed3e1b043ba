"""Which tokens of a given text a model learns from, by what it thinks of them already: DFT, CHORD; CAFT's later tokens;
cross entropy of some tokens beside a policy loss of others, in one pass: ECHO, VAPO.

    weight = dft_weights(logp.detach(), mask=mask)                         # or chord_weights
    loss, _ = tokenrl.sft_loss(logp, mask=mask, token_weight=weight)

    mu = chord_share(step, warm_up=200, decay=400, peak=0.5, valley=0.02)  # CHORD beside a policy loss
    loss = (1 - mu) * policy + mu * loss

    ntp = nll_weights(tool & mask, coef=0.1)                               # ECHO: advantages of 0 on the tool's tokens
    row = tokenrl.objective("rmt", ntp=ntp, ntp_reduction="sum")
    loss, _ = tokenrl.policy_loss(row, logp, old_logp, advantages, mask=mask, normalizer=(mask & ~tool).sum())

Log-probs are fp32 or fp64, padded [B, T] with a bool mask, or packed [N] with cu_seqlens [S + 1]; weights have their
shape and dtype, are without gradient and 0 in masked cells, which may hold anything.
"""

import math

import torch
from torch import Tensor

from ..batch.checks import as_scalar, check_name, check_number, check_tensor, check_whole, values_known
from ..batch.valid_tokens import valid_of
from ..errors import wrong

SCHEDULES = {  # of the share x of training that is done
    "constant": lambda x: 1.0,
    "linear": lambda x: x,
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "rsine": lambda x: math.sin(math.pi / 2 * (1 - x)),
}


def dft_weights(
    logp: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, power: float = 1.0
) -> Tensor:
    """p^power, p = e^logp: the gradient of -p logp is that of cross entropy without its 1 / p.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, a constant.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        power: at least 0: 0 is cross entropy; the authors' semantically adaptive variant has 0.3 for numbers, 0.7 for
            words and 1 for stop words.

    Source: DFT, arXiv 2508.05629 (authors' code, TRL, ms-swift).
    """
    check_number("power", power, 0)
    valid = valid_of(logp, mask, cu_seqlens, "logp")
    return valid.put((power * valid.take("logp", logp)).exp(), logp.dtype)


def chord_weights(logp: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """phi = p (1 - p): neither what the policy would say anyway nor what it never would.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, a constant.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.

    Source: CHORD, arXiv 2508.11408 (ms-swift).
    """
    valid = valid_of(logp, mask, cu_seqlens, "logp")
    p = valid.take("logp", logp).exp()
    return valid.put(p * (1 - p), logp.dtype)


def nll_weights(tokens: Tensor, *, coef: float, count: float | Tensor | None = None) -> Tensor:
    """fp64 of tokens' shape: coef / count on the tokens whose mean of -logp is a term with coef, for `ntp` of objective
    "rmt" with ntp_reduction="sum". Nothing is weighed where there are none.

    Args:
        tokens: bool of any shape, valid ones. ECHO's are those of tools, which must be in the mask of the loss too and
            out of its normalizer; VAPO's those of correct answers, which are the policy's as well.
        coef: of the term.
        count: of such tokens in all parts of a batch, or ranks, a number or a 0-d tensor; None: of these.

    Source: ECHO with coef 0.1, prime-rl (trainers); VAPO, arXiv 2504.05118, eq. 10 (paper).
    """
    check_number("coef", coef)
    check_tensor("tokens", tokens)
    if tokens.dtype != torch.bool:
        raise wrong("tokens", f"dtype {tokens.dtype}", "torch.bool")
    weights = tokens.double()
    if count is not None and not isinstance(count, Tensor):
        check_number("count", count, 0)
    number = weights.sum() if count is None else as_scalar("count", count, weights)
    if values_known(tokens) and values_known(number) and tokens.any() and not number > 0:
        raise wrong("count", number.item(), f"a number above 0; {tokens.sum()} of tokens are to be weighed")
    return torch.where(tokens, coef / number, 0)


def chord_share(step: float, *, warm_up: float, decay: float, peak: float, valley: float) -> float:
    """mu, the share of the supervised loss: from 0 to peak over `warm_up` steps, then along a cosine to valley over
    `decay`, and valley for good. Every number is the user's: the sources have none for all models.

    Args:
        step: at least 0.
        warm_up: steps, at least 0.
        decay: steps, at least 0.
        peak: in [0, 1].
        valley: in [0, 1].

    Source: CHORD, arXiv 2508.11408 (ms-swift).
    """
    check_number("step", step, 0)
    check_number("warm_up", warm_up, 0)
    check_number("decay", decay, 0)
    check_number("peak", peak, 0, 1)
    check_number("valley", valley, 0, 1)
    if step < warm_up:
        return step / warm_up * peak
    if step >= warm_up + decay:
        return valley
    return valley + (peak - valley) * (1 + math.cos(math.pi * (step - warm_up) / decay)) / 2


def caft_coefs(
    step: float, steps: float, *, heads: int = 4, decay: float = 0.8, scale: float = 0.01, schedule: str = "rsine",
    ratio: float = 1.0,
) -> list[float]:  # fmt: skip
    """[1, c_1, .., c_heads], c_i = decay^i scale s(step / steps), for linear_multi_token_loss: of the model's own next
    token, and of its heads for those after it.

    Args:
        step: at least 0.
        steps: of the training, above 0.
        heads: a whole number, at least 0.
        decay: at least 0, from head to head.
        scale: at least 0, of all of them.
        schedule: s(x) is "constant" 1, "linear" x, "sine" sin(pi x / 2), "rsine" sin(pi (1 - x) / 2).
        ratio: above 0, at most 1: the part of training over which it runs, and its end for good (their sine_0.1:
            "sine", ratio 0.1).

    Source: CAFT's code (authors' code).
    """
    check_name("schedule", schedule, SCHEDULES)
    check_number("step", step, 0)
    check_number("steps", steps, above=0)
    check_whole("heads", heads, 0)
    check_number("ratio", ratio, 0, 1, above=0)
    for name, value in (("decay", decay), ("scale", scale)):
        check_number(name, value, 0)
    share = scale * SCHEDULES[schedule](min(step / steps / ratio, 1.0))
    return [1.0, *(decay**i * share for i in range(1, int(heads) + 1))]
