"""Op preference and its backward: one program per sequence for its sums and score, then one for the links of them all
(tokenrl/ops/preference_reference.py). Sums and links are fp64, in a fixed order."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.preference_ops import PreferenceOpInputs, gradients, results
from . import launch
from .link_steps import link_kernel
from .links import LINKS, SCORES
from .spans import Spans, fill_outside, hull, sequence, valid_tokens

MAX_PARAMS = 4


class Tokens(NamedTuple):
    """Kernel argument, [N] each, but for logp None where there is none."""

    logp: Tensor
    divergence: Tensor | None
    token_weight: Tensor | None
    divergence_weight: Tensor | None
    ref_logp: Tensor | None


@triton.jit
def weighed(weight, at, valid, x):
    if weight is None:
        return x
    else:
        return x * tl.load(weight + at, mask=valid, other=0.0)


@triton.jit
def log_ratio(tokens, at, valid):
    x = tl.load(tokens.logp + at, mask=valid, other=0.0)
    if tokens.ref_logp is not None:
        x = x - tl.load(tokens.ref_logp + at, mask=valid, other=0.0)
    return x


@triton.jit
def sums_of(spans, tokens, begin, end, REFERENCE: tl.constexpr, BLOCK: tl.constexpr):
    """Of one sequence's w (logp - ref_logp), v D, w ref_logp and 1."""
    first, last = hull(spans, begin, end, BLOCK)
    ratios, counts = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    divergences, references = counts, counts
    for block in range(first, last, BLOCK):
        at = block + tl.arange(0, BLOCK)
        valid = valid_tokens(spans, at, at < last)
        ratios += weighed(tokens.token_weight, at, valid, log_ratio(tokens, at, valid)).to(tl.float64)
        counts += valid.to(tl.float64)
        if tokens.divergence is not None:
            x = tl.load(tokens.divergence + at, mask=valid, other=0.0)
            divergences += weighed(tokens.divergence_weight, at, valid, x).to(tl.float64)
        if REFERENCE:
            x = tl.load(tokens.ref_logp + at, mask=valid, other=0.0)
            references += weighed(tokens.token_weight, at, valid, x).to(tl.float64)
    return tl.sum(ratios, 0), tl.sum(divergences, 0), tl.sum(references, 0), tl.sum(counts, 0)


@triton.jit
def nll_of(spans, logp, begin, end, BLOCK: tl.constexpr):
    """The sum of logp and the number of its tokens."""
    first, last = hull(spans, begin, end, BLOCK)
    sums, counts = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for block in range(first, last, BLOCK):
        at = block + tl.arange(0, BLOCK)
        valid = valid_tokens(spans, at, at < last)
        sums += tl.load(logp + at, mask=valid, other=0.0).to(tl.float64)
        counts += valid.to(tl.float64)
    return tl.sum(sums, 0), tl.sum(counts, 0)


@launch.kernel
def score_kernel(
    cu_seqlens, mask, nll_mask, num_tokens, num_sequences, tokens, scores, beta: tl.float64, parameter: tl.float64,
    divergence: tl.float64, length: tl.float64, SCORE: tl.constexpr, MEAN: tl.constexpr, REFERENCE: tl.constexpr,
    NLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    spans = Spans(cu_seqlens, mask, None, num_tokens, num_sequences)
    i = tl.program_id(0)
    begin, end = sequence(spans, i)
    ratio, diverged, reference, count = sums_of(spans, tokens, begin, end, REFERENCE, BLOCK)
    share = tl.full((), 1.0, tl.float64)
    if MEAN:
        share = share / tl.maximum(count, 1.0)
    score, slope = SCORE(ratio, tl.full((), parameter, tl.float64))
    at = scores + i
    tl.store(at, score * share + length / beta * count)
    tl.store(at + spans.num_sequences, slope * share)
    tl.store(at + 2 * spans.num_sequences, divergence * diverged)
    tl.store(at + 3 * spans.num_sequences, reference * share)
    tl.store(at + 4 * spans.num_sequences, beta * (ratio * share + diverged))
    if NLL:
        of_nll = Spans(cu_seqlens, nll_mask, None, num_tokens, num_sequences)
        nll, tokens_of_nll = nll_of(of_nll, tokens.logp, begin, end, BLOCK)
        tl.store(at + 5 * spans.num_sequences, nll)
        tl.store(at + 6 * spans.num_sequences, tokens_of_nll)


def preference(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, slopes, rewards, accuracy); contract: tokenrl/ops/preference_ops.py."""
    given = PreferenceOpInputs(*args)
    logp, sequences = given.logp, given.cu_seqlens.numel() - 1
    loss, slopes, rewards, accuracy = results(given)
    scores = logp.new_empty((7, sequences), dtype=torch.float64)
    nll_mask = given.mask if given.nll_mask is None else given.nll_mask
    tokens = Tokens(logp, given.divergence, given.token_weight, given.divergence_weight, given.ref_logp)
    block, score_param = launch.block_of("span_sum", logp.numel(), sequences), [*given.score_params, 0.0][0]
    losses, sorts = rewards.shape[1], given.coupling.startswith("sorted")
    orders = given.cu_seqlens.new_empty((2, losses)) if sorts else None
    with launch.on_device_of(logp):
        if sequences > 0:
            score_kernel[(sequences,)](
                given.cu_seqlens, given.mask, nll_mask, logp.numel(), sequences, tokens, scores, given.link_params[0],
                score_param, given.divergence_factor, given.length, SCORE=SCORES[given.score],
                MEAN=given.statistic == "mean",
                REFERENCE=given.coupling == "sorted_margins" and given.ref_logp is not None, NLL=given.nll > 0,
                BLOCK=block, num_warps=launch.token_warps(block),
            )  # fmt: skip
        link_kernel[(1,)](
            (
                given.pairs, given.desirable, given.base, given.pair_weight, given.normalizer, given.nll_normalizer,
                scores, logp.new_empty((4, losses), dtype=torch.float64), orders, slopes, rewards, accuracy, loss,
            ),
            sequences, losses, given.link_params[0], given.divergence_factor, given.nll,
            *given.link_params, *[0.0] * (MAX_PARAMS - len(given.link_params)), LINK=LINKS[given.link],
            NUM_PARAMS=len(given.link_params), COUPLING=given.coupling,
            REJECTED_ALONE=given.divergence_flow == "rejected", NLL=given.nll > 0,
            NLL_OF_ALL=given.nll_mask is not None, TILE=128, SORTED=32,
        )  # fmt: skip
    return loss, slopes, rewards, accuracy


@launch.kernel
def token_gradients_kernel(
    cu_seqlens, mask, nll_mask, num_tokens, num_sequences, tokens, grad, slopes, of_logp, of_divergence,
    of_token_weight, of_divergence_weight, NLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    spans = Spans(cu_seqlens, mask, None, num_tokens, num_sequences)
    T: tl.constexpr = tokens.logp.dtype.element_ty
    i = tl.program_id(0)
    begin, end = sequence(spans, i)
    for out in tl.static_range(4):
        to = (of_logp, of_divergence, of_token_weight, of_divergence_weight)[out]
        if to is not None:
            fill_outside(spans, i, begin, end, to, BLOCK)
    upstream = tl.load(grad).to(tl.float64)
    by_sum = (upstream * tl.load(slopes + i)).to(T)
    by_divergence = (upstream * tl.load(slopes + spans.num_sequences + i)).to(T)
    by_nll = (upstream * tl.load(slopes + 2 * spans.num_sequences + i)).to(T)
    for block in range(begin, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        inside = at < end
        valid = valid_tokens(spans, at, inside)
        if of_logp is not None:
            own = tl.where(valid, weighed(tokens.token_weight, at, valid, by_sum), 0.0)
            if NLL:
                pays = valid
                if nll_mask is not None:
                    pays = inside & (tl.load(nll_mask + at, mask=inside, other=0) != 0)
                own += tl.where(pays, by_nll, 0.0)
            tl.store(of_logp + at, own, mask=inside)
        if of_token_weight is not None:
            tl.store(of_token_weight + at, by_sum * log_ratio(tokens, at, valid), mask=inside)
        if of_divergence is not None:
            own = tl.where(valid, weighed(tokens.divergence_weight, at, valid, by_divergence), 0.0)
            tl.store(of_divergence + at, own, mask=inside)
        if of_divergence_weight is not None:
            x = tl.load(tokens.divergence + at, mask=valid, other=0.0)
            tl.store(of_divergence_weight + at, by_divergence * x, mask=inside)


def preference_backward(
    grad: Tensor, slopes: Tensor, logp: Tensor, divergence: Tensor | None, token_weight: Tensor | None,
    divergence_weight: Tensor | None, ref_logp: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor,
    nll_mask: Tensor | None, nll: bool, wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of logp, divergence, token_weight and divergence_weight."""
    made, sequences = gradients(logp, wanted), cu_seqlens.numel() - 1
    if sequences == 0:
        return tuple(x.zero_() for x in made)
    block = launch.token_block(logp.numel(), sequences)
    with launch.on_device_of(logp):
        token_gradients_kernel[(sequences,)](
            cu_seqlens, mask, nll_mask, logp.numel(), sequences,
            Tokens(logp, divergence, token_weight, divergence_weight, ref_logp), grad, slopes,
            *(x if w else None for x, w in zip(made, wanted, strict=True)), NLL=nll, BLOCK=block,
            num_warps=launch.token_warps(block),
        )  # fmt: skip
    return made
