"""unlearning_loss: a row of the table of unlearning objectives on tokens to forget and tokens to retain."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch.checks import check_constant, check_floats, check_name, check_positive, check_tensor, values_known
from ..batch.layout import Layout, layout_of
from ..batch.spans import spans_of
from ..errors import wrong
from ..logprobs.divergence import linear_token_divergence, token_divergence
from ..objectives.unlearning import Unlearning, unlearning
from ..observed import observed
from ..ops.preference_reference import known
from .preference_arguments import as_count

TARGETS = ("detached", "attached")
Count = float | Tensor | None


class UnlearningParts(NamedTuple):
    """The terms of the loss before their coefficients, 0-d, fp64, without gradient: L_f, L_r, L_e, L_s."""

    forget: Tensor
    retain: Tensor
    eos: Tensor
    smoothing: Tensor


@observed
def unlearning_loss(
    objective: str | Unlearning,
    logp: Tensor,
    ref_logp: Tensor | None = None,
    *,
    forget_mask: Tensor,
    retain_mask: Tensor | None = None,
    eos_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    divergence: Tensor | None = None,
    normalizer: Count = None,
    retain_normalizer: Count = None,
    eos_normalizer: Count = None,
) -> tuple[Tensor, UnlearningParts]:
    """The loss of a policy that is to forget some tokens and to keep others.

        loss = retain mean_r -logp + forget (alpha mean_f term(x) + smoothing mean_f D_t) + eos mean_e -logp

    Rows whose coefficient is not 0 need the masks they name. logp and divergence get gradients. Sums are fp64; a mean
    over nothing is 0.

    Args:
        objective: a name in tokenrl.UNLEARNINGS, or what tokenrl.unlearning(name, ...) returns.
        logp: fp32 or fp64, padded [B, T], or packed [N] with cu_seqlens.
        ref_logp: of the reference, of the same shape, constant; None for rows without one.
        forget_mask: bool, of logp's shape. A tri-mask of 0, 1, 2 is forget_mask=kinds == 2, retain_mask=kinds == 1.
        retain_mask: likewise, no token in both; other cells may hold anything.
        eos_mask: bool, the ends of sequences; those to retain count.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        divergence: of "au", one per token: smoothing_kl of the logits, or linear_smoothing_kl.
        normalizer: what to divide by instead of the number of tokens to forget (of sequences with any, for rows of
            sequences).
        retain_normalizer: likewise of tokens to retain.
        eos_normalizer: likewise of ends.

    Returns:
        (loss 0-d in the dtype of logp, UnlearningParts).

    Raises:
        ValueError: naming the argument, what was given and what is accepted.
    """
    row = unlearning(objective)
    check_floats("logp", logp)
    for name, given, wanted in (
        ("ref_logp", ref_logp, row.reference == "given"), ("retain_mask", retain_mask, row.retain > 0),
        ("eos_mask", eos_mask, row.eos > 0), ("divergence", divergence, row.smoothing > 0),
    ):  # fmt: skip
        if wanted and given is None:
            raise wrong(name, None, f"one; objective {row.name!r} needs it")
        if given is not None and not wanted and name in ("ref_logp", "divergence"):
            raise wrong(name, "one", f"None; objective {row.name!r} has no use for it")
    layout = layout_of(logp, mask=None, cu_seqlens=cu_seqlens)
    layout = dataclasses.replace(layout, mask=_mask("forget_mask", forget_mask, layout))
    retained = _mask("retain_mask", retain_mask, layout)
    if values_known(retained) and (retained & layout.valid()).any():
        raise wrong("retain_mask", "tokens of forget_mask", "tokens to retain alone")
    ends = retained & _mask("eos_mask", eos_mask, layout)
    parts = UnlearningParts(
        _forget(row, layout, logp, ref_logp, normalizer),
        _mean("retain_normalizer", -logp.reshape(-1), retained, retain_normalizer),
        _mean("eos_normalizer", -logp.reshape(-1), ends, eos_normalizer),
        _smoothing(layout, divergence, normalizer),
    )
    coefs = row.forget * row.alpha, row.retain, row.eos, row.forget * row.smoothing
    loss = logp.reshape(-1)[:0].sum(dtype=torch.float64)  # of no token: without any term it has a gradient of zeros
    for coef, part in zip(coefs, parts, strict=True):
        loss = loss + coef * part if coef > 0 else loss
    return loss.to(logp.dtype), UnlearningParts(*(part.detach() for part in parts))


def smoothing_kl(
    logits: Tensor, *, tempered: float = 2.0, target: str = "detached", temperature: float | Tensor = 1.0,
    row_mask: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """D(softmax(z / tempered) || softmax(z)), of z = logits / temperature, [N] or [B, T]: pulls a distribution to its
    own flatter self. For the divergence of unlearning_loss("au", ...), row_mask its forget_mask.

        target "detached"   d/dz_v = p_v - q_v                       q = softmax(z / tempered), a constant
        target "attached"   + q_v ((log q_v - log p_v) - D) / tempered     through both, as a copy of AU's code has it

    Args:
        logits: bf16, fp16, fp32 or fp64 [N, V] or [B, T, V].
        tempered: above 0.
        target: "detached" or "attached", as above.
        temperature: a number above 0, or one per token.
        row_mask: bool [N] or [B, T]: rows where it is False give 0 and are never read.
        backend: as for policy_loss.
    """
    check_name("target", target, TARGETS)
    check_positive("tempered", tempered)
    check_tensor("logits", logits)
    _check_temperature(temperature)
    other = logits.detach() if target == "detached" else logits
    found = token_divergence(
        logits, other, "forward_kl", temperature=temperature, other_temperature=temperature * tempered,
        row_mask=row_mask, backend=backend,
    )  # fmt: skip
    assert isinstance(found, Tensor)
    return found


def linear_smoothing_kl(
    hidden: Tensor, weight: Tensor, *, tempered: float = 2.0, temperature: float | Tensor = 1.0,
    bias: Tensor | None = None, row_mask: Tensor | None = None, **head: Any,
) -> Tensor:  # fmt: skip
    """smoothing_kl of the logits hidden @ weight^T + bias, which are not held, with target "detached" (another head is
    frozen there).

    Args:
        hidden: [N, D] or [B, T, D].
        weight: [V, D].
        tempered: above 0.
        temperature: a number above 0, or one per token.
        bias: [V].
        row_mask: bool [N] or [B, T]: rows where it is False give 0 and enter no GEMM.
        head: as for linear_token_divergence.
    """
    check_positive("tempered", tempered)
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None or name != "bias":
            check_tensor(name, x)
    _check_temperature(temperature)
    frozen = [x if x is None else x.detach() for x in (hidden, weight, bias)]
    return linear_token_divergence(
        hidden, weight, frozen[0], frozen[1], "forward_kl", bias=bias, other_bias=frozen[2],  # type: ignore[arg-type]
        temperature=temperature, other_temperature=temperature * tempered, row_mask=row_mask, **head,
    )  # fmt: skip


def _check_temperature(temperature: float | Tensor) -> None:
    if not isinstance(temperature, Tensor):  # the shape of others is for token_divergence to say
        check_positive("temperature", temperature)


def _forget(row: Unlearning, layout: Layout, logp: Tensor, ref_logp: Tensor | None, normalizer: Count) -> Tensor:
    x = logp.reshape(-1)
    if ref_logp is not None:
        check_floats("ref_logp", ref_logp)
        check_constant("ref_logp", ref_logp)
        x = x - layout.flat_tokens("ref_logp", ref_logp)
    x = torch.where(layout.valid(), x, 0).double()
    if row.statistic == "token":
        return _mean("normalizer", known(row.term.of, x), layout.valid(), normalizer)
    spans = spans_of("sequence", layout)
    counts = spans.counts()
    scores = spans.sum(x) if row.statistic == "sum" else spans.mean(x)
    return _mean("normalizer", known(row.term.of, scores), counts > 0, normalizer)


def _smoothing(layout: Layout, divergence: Tensor | None, normalizer: Count) -> Tensor:
    if divergence is None:
        return torch.zeros((), dtype=torch.float64, device=layout.cu_seqlens.device)
    check_floats("divergence", divergence)
    return _mean("normalizer", layout.flat_tokens("divergence", divergence), layout.valid(), normalizer)


def _mean(name: str, x: Tensor, counted: Tensor, normalizer: Count) -> Tensor:
    total = torch.where(counted, x, 0).double().sum()
    return total / as_count(name, normalizer, counted.sum().clamp(min=1), total)


def _mask(name: str, mask: Tensor | None, layout: Layout) -> Tensor:
    """bool [N], None for no token."""
    if mask is None:
        return torch.zeros(layout.num_tokens, dtype=torch.bool, device=layout.cu_seqlens.device)
    layout.check_tokens(name, mask)
    if mask.dtype != torch.bool:
        raise wrong(name, f"dtype {mask.dtype}", "torch.bool")
    return mask.reshape(-1)
