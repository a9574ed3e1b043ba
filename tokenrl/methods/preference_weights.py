"""What single papers weigh in preference_loss: tokens (LD-DPO, TGDPO, cDPO, MaPO, TAB-PO) or pairs (WPO, MAH-DPO), and
the terms that they add (T-REG, SparsePO, TAB-PO).

    weight = tgdpo_weights(aligned_logp, ref_logp, mask=mask)
    loss, _ = tokenrl.preference_loss("dpo", logp, ref_logp, mask=mask, token_weight=weight)

    weight = wpo_weights(stats.logp.detach(), stats.log_sum_sq_probs.detach(), mask=mask)   # of token_logprobs
    loss, _ = tokenrl.preference_loss("dpo", logp, ref_logp, mask=mask, pair_weight=weight)

Arguments per token are fp32 or fp64, padded [B, T] with a bool mask, or packed [N] with cu_seqlens [S + 1]; weights of
tokens have their shape and dtype, are without gradient and 0 in masked cells, which may hold anything. pairs: as for
preference_loss.
"""

import math

import torch
from torch import Tensor

from ..batch.checks import (
    as_float64,
    check_floats,
    check_integers,
    check_name,
    check_number,
    check_tensor,
    check_whole,
    values_known,
)
from ..batch.layout import Layout, layout_of
from ..batch.pairs import as_pairs, sides
from ..batch.spans import spans_of
from ..errors import wrong

CHOSEN_WEIGHTS = ("one", "score")
PER = ("weight", "token")
STATISTICS = ("sum", "mean")


def _taken(name: str, x: Tensor, layout: Layout) -> Tensor:
    """fp64 [N], 0 in masked cells."""
    check_floats(name, x)
    return torch.where(layout.valid(), layout.flat_tokens(name, x.detach()), 0).double()


def _put(weight: Tensor, layout: Layout, like: Tensor) -> Tensor:
    return torch.where(layout.valid(), weight, 0).to(like.dtype).view(layout.shape)


def wpo_weights(
    logp: Tensor, log_sum_sq_probs: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """fp64 [P]: w(y_w) w(y_l), w = exp(mean_t logp_t - log sum_v p_v^2), near 1 where the policy would say it itself.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens; no gradient passes.
        log_sum_sq_probs: of that shape, log sum_v p_v^2, of token_logprobs.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1].
        pairs: integers [P, 2], as for preference_loss.

    Source: WPO, arXiv 2406.11827, eq. 2 (TRL, without a bound).
    """
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    aligned = _taken("logp", logp, layout) - _taken("log_sum_sq_probs", log_sum_sq_probs, layout)
    weight = spans_of("sequence", layout).mean(aligned)
    chosen, rejected = as_pairs(pairs, layout)
    return (weight[chosen] + weight[rejected]).exp()


def ld_dpo_weights(
    logp: Tensor, *, alpha: float, mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """1, and alpha for the tokens that come after as many as the shorter sequence of their pair has.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens; its shape and dtype count.
        alpha: in [0, 1].
        mask: bool of that shape.
        cu_seqlens: integers [S + 1].
        pairs: integers [P, 2], as for preference_loss; every sequence is in one pair at most.

    Source: LD-DPO, arXiv 2409.06411 (TRL ld_alpha).
    """
    check_number("alpha", alpha, 0, 1)
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    counts = spans_of("sequence", layout).counts().long()
    shared, (chosen, rejected) = counts.clone(), as_pairs(pairs, layout)
    both = torch.minimum(counts[chosen], counts[rejected])
    shared.index_copy_(0, chosen, both).index_copy_(0, rejected, both)
    valid = layout.valid()
    before = layout.spread(counts.cumsum(0) - counts)
    tail = valid.long().cumsum(0) - before > layout.spread(shared)
    return _put(torch.ones_like(tail, dtype=torch.float64).masked_fill(tail, alpha), layout, logp)


def tgdpo_weights(
    aligned_logp: Tensor, ref_logp: Tensor, *, beta: float = 0.1, alpha: float = 0.5, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, pairs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """1 + alpha r_t in chosen sequences, 1 - alpha r_t in rejected ones, r_t = beta (aligned_logp_t - ref_logp_t).

    Args:
        aligned_logp: fp32 or fp64 [B, T], or [N] with cu_seqlens, of a model that is aligned already (by DPO or SimPO).
        ref_logp: of that shape, of the reference.
        beta: above 0.
        alpha: at least 0, and small enough to keep weights above 0.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1].
        pairs: integers [P, 2], as for preference_loss.

    Source: TGDPO, arXiv 2506.14574 (authors' code).
    """
    check_number("beta", beta, above=0)
    check_number("alpha", alpha, 0)
    layout = layout_of(aligned_logp, mask=mask, cu_seqlens=cu_seqlens, name="aligned_logp")
    reward = beta * (_taken("aligned_logp", aligned_logp, layout) - _taken("ref_logp", ref_logp, layout))
    side = layout.spread(sides(as_pairs(pairs, layout), layout))
    return _put(1 + alpha * side * reward, layout, aligned_logp)


def cdpo_weights(
    score: Tensor, *, chosen: str = "one", mask: Tensor | None = None, cu_seqlens: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """1 - score in rejected sequences, so that tokens of wrong answers count most; in chosen ones 1, or the score.

    Args:
        score: fp32 or fp64 [B, T], or [N] with cu_seqlens: of token_selection.critical_scores or
            linear_critical_scores.
        chosen: "one" or "score", what tokens of chosen sequences weigh.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1].
        pairs: integers [P, 2], as for preference_loss.

    Source: cDPO, arXiv 2411.19943 (authors' code, which forgets to sum over tokens: it compares position by position).
    """
    check_name("chosen", chosen, CHOSEN_WEIGHTS)
    layout = layout_of(score, mask=mask, cu_seqlens=cu_seqlens, name="score")
    flat = _taken("score", score, layout)
    side = layout.spread(sides(as_pairs(pairs, layout), layout))
    kept = flat if chosen == "score" else torch.ones_like(flat)
    return _put(torch.where(side < 0, 1 - flat, kept), layout, score)


def mapo_weights(activation: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """In [0, 1], fp32 (fp64 of fp64): the mean of an activation over its channels, from the lowest of the sequence, 0,
    to its highest, 1. SparsePO's token_weight and divergence_weight without training: the mean of these over the layers
    of the reference model.

    Args:
        activation: any float dtype, [B, T, D], or [N, D] with cu_seqlens; no gradient passes.
        mask: bool [B, T] or [N].
        cu_seqlens: integers [S + 1].

    Source: MaPO of SparsePO, arXiv 2410.05102 (authors' code; that it normalises first changes nothing).
    """
    check_tensor("activation", activation)
    x = activation.detach().mean(-1, dtype=torch.float64 if activation.dtype == torch.float64 else torch.float32)
    layout = layout_of(x, mask=mask, cu_seqlens=cu_seqlens, name="a mean per token of activation")
    flat = x.reshape(-1)
    low, high = map(layout.spread, spans_of("sequence", layout).edges(flat))
    return _put(torch.where(high > low, (flat - low) / (high - low), 0), layout, x)


def tab_po_weights(weight: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Weights of tokens, at least 0, with mean 1 in each sequence.

    Args:
        weight: fp32 or fp64 [B, T], or [N] with cu_seqlens, at least 0.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1].

    Source: TAB-PO, arXiv 2603.00025 (authors' code).
    """
    layout = layout_of(weight, mask=mask, cu_seqlens=cu_seqlens, name="weight")
    flat, spans = _taken("weight", weight, layout), spans_of("sequence", layout)
    mean = spans.mean(flat)
    return _put(flat / layout.spread(torch.where(mean > 0, mean, 1)), layout, weight)


def tab_po_barrier(
    logp: Tensor, weight: Tensor, *, tau: float = 0.66, per: str = "weight", mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, pairs: Tensor | None = None, pair_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """0-d: the mean over chosen sequences of sum_t g_t w_t (-logp_t) / max(1, sum_t g_t w_t), g_t = 1 where the
    token's probability is below tau. It is added to the loss, times 1/2 in the paper.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens; it gets a gradient.
        weight: of that shape, of tab_po_weights.
        tau: a probability, above 0.
        per: "weight", or "token" for a divisor of max(1, sum_t g_t).
        mask: bool of that shape.
        cu_seqlens: integers [S + 1].
        pairs: integers [P, 2], as for preference_loss.
        pair_weight: [P], as for preference_loss.

    Source: TAB-PO, arXiv 2603.00025 (authors' code; per="token" that of their ablation).
    """
    check_name("per", per, PER)
    check_number("tau", tau, 0, 1, above=0)
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    check_floats("logp", logp)
    kept, spans = _taken("weight", weight, layout), spans_of("sequence", layout)
    flat = torch.where(layout.valid(), logp.reshape(-1), 0).double()
    gate = layout.valid() & (flat < math.log(tau))
    gated = torch.where(gate, kept, 0)
    counted = gated if per == "weight" else gate.double()
    values = (spans.sum(-gated * flat) / spans.sum(counted).clamp(min=1))[as_pairs(pairs, layout)[0]]
    if pair_weight is not None:
        values = values * as_float64("pair_weight", pair_weight, values.shape, values)
    return (values.sum() / max(values.numel(), 1)).to(logp.dtype)


def t_reg_term(
    logp: Tensor, better_logp: Tensor, worse_logp: Tensor, margins: Tensor, *, beta: float = 0.1,
    statistic: str = "sum", mask: Tensor | None = None, cu_seqlens: Tensor | None = None, pairs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """0-d: the mean over pairs of sigma(-margin) (L(y_w) + L(y_l)), L(y) = -sum_t beta r_t logp_t, and
    r_t = sigma(better_logp_t - worse_logp_t) - 1/2. It is added to the loss, times 0.1 to 0.5 in the paper.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens; it gets a gradient.
        better_logp: of the reference model under a prompt that asks for a better answer.
        worse_logp: under one that asks for a worse one.
        margins: [P], metrics.margins of preference_loss (less gamma for SimPO's); they weigh, without gradient.
        beta: above 0.
        statistic: "sum" or "mean", of the tokens of each sequence.
        mask: bool of the shape of logp.
        cu_seqlens: integers [S + 1].
        pairs: integers [P, 2], as for preference_loss.

    Source: T-REG, arXiv 2412.02685 (notes; that the weight is constant and tokens are summed is our reading).
    """
    check_number("beta", beta, above=0)
    check_name("statistic", statistic, STATISTICS)
    check_floats("logp", logp)
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    better, worse = (_taken(n, x, layout) for n, x in (("better_logp", better_logp), ("worse_logp", worse_logp)))
    flat = torch.where(layout.valid(), logp.reshape(-1), 0).double()
    sums = spans_of("sequence", layout).take(statistic, -beta * ((better - worse).sigmoid() - 0.5) * flat)
    chosen, rejected = as_pairs(pairs, layout)
    weight = (-as_float64("margins", margins, chosen.shape, chosen)).sigmoid()
    return ((weight * (sums[chosen] + sums[rejected])).sum() / max(len(chosen), 1)).to(logp.dtype)


def sparsepo_l1(
    weight: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, pairs: Tensor | None = None
) -> Tensor:
    """0-d: the mean over pairs of sum_t |w_t| of both sequences, of a learned token_weight or divergence_weight, with
    its gradient, 0 where a weight is 0. It is added to the loss, times a factor for each of the two; where one mask is
    both, times the half of each.

    Args:
        weight: fp32 or fp64 [B, T], or [N] with cu_seqlens.
        mask: bool of that shape.
        cu_seqlens: integers [S + 1].
        pairs: integers [P, 2], as for preference_loss.

    Source: SparsePO, arXiv 2410.05102 (authors' code).
    """
    check_floats("weight", weight)
    layout = layout_of(weight, mask=mask, cu_seqlens=cu_seqlens, name="weight")
    flat = torch.where(layout.valid(), weight.reshape(-1), 0).abs().double()
    sums, (chosen, rejected) = spans_of("sequence", layout).sum(flat), as_pairs(pairs, layout)
    return ((sums[chosen] + sums[rejected]).sum() / max(len(chosen), 1)).to(weight.dtype)


def mah_dpo_weights(dimension: Tensor, heads: int) -> Tensor:
    """fp64 [P]: P / (K n_d), so that the mean over pairs is the mean over the K heads that have any of the mean over
    the n_d pairs of each.

    Args:
        dimension: integers [P] in [0, heads), the head of each pair.
        heads: a whole number, at least 1.

    Source: MAH-DPO, arXiv 2510.01167 (authors' code).
    """
    check_integers("dimension", dimension)
    if dimension.dim() != 1:
        raise wrong("dimension", f"shape {list(dimension.shape)}", "one integer per pair, [P]")
    check_whole("heads", heads, 1)
    if values_known(dimension) and ((dimension < 0) | (dimension >= heads)).any():
        raise wrong("dimension", f"{dimension.min()} to {dimension.max()}", f"numbers of heads, 0 to {heads - 1}")
    counts = torch.zeros(int(heads), dtype=torch.float64, device=dimension.device)
    counts.index_add_(0, dimension, torch.ones_like(dimension, dtype=torch.float64))
    return dimension.numel() / ((counts > 0).sum() * counts[dimension])
