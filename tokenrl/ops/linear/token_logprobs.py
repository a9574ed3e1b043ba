"""Statistics and gradients of a head from hidden states, over tiles of hidden @ weight^T + bias.

A tile of logits is torch's GEMM into memory that every tile uses again; token_logprobs reads it, or turns it into its
gradient in place. The statistics of tiles side by side are merged; the gradients of the products are torch's GEMMs.
Written once, for the kernels of any backend (`ops`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernel_ops import ALWAYS, IGNORED, RESULTS, logprob_results
from .gemm import SUMMED_ROWS, ProductSum, add_product, column_sums, empty, sum_dtype
from .head import (
    FEWEST_TOKENS,
    Head,
    Rows,
    Tiles,
    as_tile,
    compacted,
    fitting_whole_rows,
    rows_at,
    split,
    tiles_of,
    whole_rows_of,
)
from .lift import lifted

ELSEWHERE = -1  # an id of another tile: its row is read, no logit of this tile is its own


def local_ids(ids: Tensor, at: slice) -> Tensor:
    """ids [n, K] as those of a tile."""
    here = torch.where((ids >= at.start) & (ids < at.stop), ids - at.start, ELSEWHERE)
    return torch.where(ids == IGNORED, IGNORED, here)


def statistics(
    head: Head, hidden: Tensor, ids: Tensor, outputs: list[str], budget: int, kept: Tensor | None = None
) -> list[Tensor]:
    """The results of token_logprobs for hidden [N, D] and ids [N, K]; rows whose ids are all ignored enter no GEMM.

    kept: [N, V], as fit into the budget, for the logits of the other rows, in order, and zeros."""
    index, count = compacted((ids != IGNORED).any(-1))
    # An order compares the ids' own logits with whole rows; the others are whole wherever those of linear_policy_loss
    # are, so that on-policy its ratios are 1.
    ordered = "is_top1" in outputs or "rank" in outputs
    whole = ordered or fitting_whole_rows(head, budget) >= min(count, FEWEST_TOKENS)
    tiles = (whole_rows_of if whole else tiles_of)(head, count, budget)
    memory = empty(tiles.cells, hidden, head.dtype) if kept is None else kept.view(-1)
    if kept is not None:
        kept[count:].zero_()
    if index is None and tiles == Tiles(count, head.vocab):
        return _of_rows(head, hidden.to(head.dtype), ids, slice(0, count), outputs, tiles, memory)
    results = [x.zero_() for x in logprob_results(hidden, ids, outputs, sum_dtype(head.dtype))]
    for at in split(count, tiles.rows):
        rows = rows_at(index, at)
        found = _of_rows(head, hidden[rows].to(head.dtype), ids[rows], rows, outputs, tiles, memory)
        for result, values in zip(results, found, strict=True):
            if result.shape[0] == ids.shape[0]:
                result[rows] = values.to(result.dtype)
    return results


def _of_rows(
    head: Head, hidden: Tensor, ids: Tensor, rows: Rows, outputs: list[str], tiles: Tiles, memory: Tensor
) -> list[Tensor]:
    """The results of the rows of a tile."""
    whole = slice(0, head.vocab)
    if tiles.columns == head.vocab:
        logits = head.whole_logits(hidden, as_tile(memory, hidden.shape[0], whole))
        transform = head.transform(rows, hidden.shape[0], whole)
        return list(head.ops.token_logprobs(logits, ids, *transform, outputs, False))
    parts = []
    for at in split(head.vocab, tiles.columns):
        logits = head.logits(hidden, head.columns(at), at, as_tile(memory, hidden.shape[0], at))
        transform = head.transform(rows, hidden.shape[0], at)
        found = head.ops.token_logprobs(logits, local_ids(ids, at), *transform, outputs, False)
        parts.append(dict(zip(RESULTS, found, strict=True)))
        parts[-1]["here"] = (ids >= at.start) & (ids < at.stop)
        if "mean_logit" in outputs:
            parts[-1]["kept"] = _kept(head, rows, at, ids.shape[0])
    return list(merged(parts, ids, outputs).values())


def _kept(head: Head, rows: Rows, at: slice, count: int) -> Tensor:
    """How many logits of a tile the mask keeps, [n]; summed a few rows at a time, as a sum of bools copies them."""
    if head.keep_mask is None:
        return head.weight.new_full((count,), at.stop - at.start, dtype=torch.int64)
    if head.keep_mask.shape[0] == 1:
        return head.keep_mask[0, at].sum().expand(count)
    return torch.cat([some.sum(-1) for some in head.keep_mask[rows, at].split(SUMMED_ROWS)])


def merged(parts: list[dict[str, Tensor]], ids: Tensor, outputs: list[str]) -> dict[str, Tensor]:
    """Statistics of tiles side by side, or of ranks -> those of their rows, in fp64, differentiable in those that are.

    parts: results of token_logprobs, [n] and [n, K], with "here", bool [n, K]: which ids are the part's, and for
    mean_logit "kept", [n]: how many logits are. With l_i the lse of part i, lse = log sum_i e^l_i and q_i = e^(l_i -
    lse), its share of the probability: entropy = sum_i q_i (entropy_i - log q_i), log_sum_sq_probs = log sum_i q_i^2
    e^(log_sum_sq_probs_i).
    """
    unasked = {*RESULTS} - {*ALWAYS, *outputs}
    of = {name: torch.stack([part[name] for part in parts]) for name in {*parts[0]} - unasked}
    rounded = of["lse"].double()
    # A part without any logit above -inf has no share, and no other statistic.
    each = torch.where(rounded == -torch.inf, rounded, rounded + of["lse_rest"])
    lse = each.logsumexp(0)
    log_share = each - lse
    del rounded, each  # beside a tile they are not nothing
    share = log_share.exp()
    gone = share == 0

    def weigh(values: Tensor) -> Tensor:
        return torch.where(gone, 0, values)

    shifted = torch.where(log_share[..., None] == -torch.inf, -torch.inf, of["logp"] + log_share[..., None])
    own = torch.where(of["here"], shifted, 0).sum(0)
    known = of["here"].any(0) | (ids == IGNORED)
    found = {name: lse.new_empty(0) for name in RESULTS} | {
        "logp": torch.where(known, own, torch.nan),
        "entropy": (share * (weigh(of["entropy"]) - weigh(log_share))).sum(0),
        "lse": lse,
        "lse_rest": lse - lse.to(of["lse"].dtype),
    }
    if "log_sum_sq_probs" in outputs:
        squares = weigh(of["log_sum_sq_probs"]).double().exp()
        found["log_sum_sq_probs"] = (share * share * squares).sum(0).log()
    if "mean_logit" in outputs:
        kept = of["kept"]
        found["mean_logit"] = torch.where(kept > 0, of["mean_logit"].double() * kept, 0).sum(0) / kept.sum(0)
    if "max_prob" in outputs:
        found["max_prob"] = (share * weigh(of["max_prob"])).amax(0)
    return found


@dataclass(frozen=True)
class Gradients:
    """Where gradients go, None where not wanted. hidden: zeros; weight: anything; bias: zeros in sum_dtype.
    adds: weight is in sum_dtype and holds a sum that is added to."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    adds: bool = False


class KeptLogits:
    """logits: [N, V], as `statistics` keeps them. index: of the rows with a gradient, None: of all."""

    def __init__(self, logits: Tensor, ids: Tensor, index: Tensor | None):
        self.logits = logits
        self.rows = None if index is None else ((ids != IGNORED).any(-1).cumsum(0) - 1)[index]

    def tile(self, some: slice, at: slice, out: Tensor) -> Tensor:
        """A copy in `out`: the backward of a retained graph, again, finds the logits as they were."""
        columns = self.logits[:, at]
        if self.rows is None:
            return out.copy_(columns[some])
        return torch.index_select(columns, 0, self.rows[some], out=out)


def gradients(
    head: Head, upstream: Sequence[Tensor | None], hidden: Tensor, ids: Tensor, saved: Sequence[Tensor], budget: int,
    grads: Gradients, logits_kept: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills grads. upstream: by logp [N, K], entropy, lse, log_sum_sq_probs. saved: lse, lse_rest, entropy and
    log_sum_sq_probs. logits_kept: by `statistics`; None: they are computed again. Rows without an upstream gradient
    enter no GEMM.

    A tile of all rows, turned into its gradient, is the gradient of its columns' weights, whole, and a share of that
    of hidden, which is summed over the tiles."""
    index, count = compacted(_has_gradient(ids, upstream))
    rows = rows_at(index, slice(0, count))
    kept = None if logits_kept is None else KeptLogits(logits_kept, ids, index)
    budget -= 0 if logits_kept is None else logits_kept.nbytes
    states, ids = hidden[rows].to(head.dtype), ids[rows]
    upstream, by = lifted(head, rows, [None if g is None else g[rows] for g in upstream], states)
    saved = [x[rows] if x.numel() else x for x in saved]
    total = states.new_zeros((0,) if grads.hidden is None else states.shape, dtype=sum_dtype(head.dtype))
    tiles = tiles_of(head, count, budget, sums=states.nbytes + total.nbytes)
    memory = empty(tiles.cells, hidden, head.dtype)
    for at in split(head.vocab, tiles.columns):
        columns, local = head.columns(at), local_ids(ids, at)
        if grads.weight is not None:
            weight_sum = ProductSum(grads.weight[at], head.dtype, once=count <= tiles.rows, adds=grads.adds)
        for some in split(count, tiles.rows):
            tile = as_tile(memory, some.stop - some.start, at)
            logits = kept.tile(some, at, tile) if kept else head.logits(states[some], columns, at, tile)
            head.ops.token_logprobs_backward_(
                *(None if g is None else g[some].contiguous() for g in upstream), logits, local[some].contiguous(),
                *(x[some] if x.numel() else x for x in saved),
                *head.transform(rows_at(index, some), logits.shape[0], at),
            )  # fmt: skip
            if grads.hidden is not None:
                add_product(total[some], logits, columns, by)
            if grads.weight is not None:
                weight_sum.add(logits.t(), states[some], by)
            if grads.bias is not None:
                grads.bias[at].add_(column_sums(logits), alpha=by)
        del columns  # the next are cast without these
        if grads.weight is not None:
            weight_sum.finish()
    if grads.hidden is not None:
        grads.hidden[rows] = total.to(grads.hidden.dtype)


def _has_gradient(ids: Tensor, upstream: Sequence[Tensor | None]) -> Tensor:
    """bool [N]: rows that are read and have an upstream gradient other than zero."""
    used = ids != IGNORED
    grad_logp, *per_row = upstream
    some = torch.zeros_like(used[:, 0]) if grad_logp is None else (used & (grad_logp != 0)).any(-1)
    for grad in per_row:
        if grad is not None:
            some = some | (grad != 0)
    return some & used.any(-1)
