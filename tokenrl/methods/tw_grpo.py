"""TW-GRPO: tokens weigh more at the positions where the rollouts of a prompt disagree.

    w = tw_grpo_weights(logits, group_ids, mask=mask)  # or linear_tw_grpo_weights(hidden, lm_head, group_ids, ...)
    loss, _ = policy_loss("grpo", logp, None, A, mask=mask, token_weight=w, aggregation="token-mean")

The authors multiply their KL term by the weight too: one more policy_loss of "kl_k3" with the same token_weight.

Source: arXiv 2505.24718 (authors' code).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch.checks import FINITE, check_name, check_number
from ..batch.groups import Groups, as_groups
from ..batch.layout import Layout
from ..batch.valid_tokens import ValidTokens
from ..errors import wrong
from ..logprobs.logit_columns import HeadColumns, LogitColumns, budget_of, head_columns, logit_columns, tokens_of
from ..objectives.excess import excess

POSITIONS = ("all", "valid")
CLAMP = 11.0
FLOOR = 1e-8
COLUMNS = 4096  # of a tile; with so many tokens it stays in a CPU's cache
TOKENS = {"cpu": 256, "cuda": 8192}
TEMPORARIES = 5  # matrices of a tile's size that its formula holds at once


@dataclass(frozen=True)
class _Slots:
    """The K pairs of a group and a position at which it has a token. order: int64 [M], the valid tokens, those of a
    slot side by side; counts: how many they are; missing: how many rows of the group have none there; size: the rows
    of the group; group: [K]."""

    order: Tensor
    counts: Tensor
    missing: Tensor
    size: Tensor
    group: Tensor

    def part(self, at: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return self.counts[at], self.missing[at, None].to(dtype), self.size[at, None].to(dtype)


def _slots(valid: ValidTokens, groups: Groups) -> _Slots:
    positions = max(valid.layout.num_tokens, 1)
    key = groups.index[valid.row] * positions + valid.cells - valid.layout.cu_seqlens[valid.row]
    key, order = key.sort(stable=True)
    distinct, counts = key.unique_consecutive(return_counts=True)
    group = distinct // positions
    size = torch.bincount(groups.index, minlength=groups.number)[group]
    return _Slots(order, counts, size - counts, size, group)


def _penalty(x: Tensor) -> Tensor:
    x = x.clamp(-CLAMP, CLAMP)
    return excess(x).sum(1, keepdim=True)


def _tile(z: Tensor, lse: Tensor, counts: Tensor, missing: Tensor, size: Tensor, vocab: int) -> Tensor:
    """[k, 1]: what some columns add to d of k slots, from the logits z [n, columns] and lse [n, 1] of their tokens.

    Log-probs are taken relative to those of the slot's first row, so that rows that are the same have d = 0 exactly.
    """
    slot = torch.arange(counts.numel(), device=z.device).repeat_interleave(counts, output_size=z.shape[0])
    first = counts.cumsum(0) - counts
    one, lse_one = z[first], lse[first]
    x = z - one[slot] - (lse - lse_one[slot])
    uniform = lse_one - one - torch.tensor(vocab, dtype=z.dtype, device=z.device).log()
    mean = (_sums(x, counts) + missing * uniform) / size
    return (_sums(_penalty(mean[slot] - x), counts) + missing * _penalty(mean - uniform)) / size


def _sums(x: Tensor, counts: Tensor) -> Tensor:
    return torch.segment_reduce(x, "sum", lengths=counts, axis=0, unsafe=True)


def _tile_size(source: LogitColumns | HeadColumns, largest: int, budget: int) -> tuple[int, int]:
    """(tokens, columns) of a tile; the tokens of a slot stay together."""
    columns = min(source.vocab, COLUMNS)
    most = max(TOKENS.get(source.device.type, TOKENS["cuda"]), largest)
    while True:
        fit = (budget - columns * source.bytes_per_column) // (
            source.bytes_per_token + columns * TEMPORARIES * source.dtype.itemsize
        )
        if fit >= largest:
            return min(most, fit), columns
        if columns <= 256:
            accepted = f"more: a tile of the {largest} rows of a group and {columns} columns does not fit"
            raise wrong("memory_budget", f"{budget} bytes", accepted)
        columns = max(columns // 2, 256)


@torch.no_grad()
def _divergences(
    source: LogitColumns | HeadColumns, lse: Tensor, valid: ValidTokens, slots: _Slots, budget: int
) -> Tensor:
    """d, fp64 [K], by tiles of the vocabulary and of slots."""
    found = lse.new_zeros(slots.counts.numel(), dtype=torch.float64)
    if not found.numel():
        return found
    largest = int(slots.counts.max())
    tokens, columns = _tile_size(source, largest, budget)
    step = tokens // largest
    starts = (slots.counts.cumsum(0) - slots.counts)[::step].tolist() + [lse.numel()]
    cells, lse = valid.cells[slots.order], lse[slots.order, None]
    for part, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        at = slice(part * step, (part + 1) * step)
        states, shared = source.states(cells[begin:end]), slots.part(at, source.dtype)
        for column in range(0, source.vocab, columns):
            z = source.columns(states, slice(column, column + columns))
            found[at] += _tile(z, lse[begin:end], *shared, source.vocab)[:, 0].double()
    return found


def _weights(
    d: Tensor, valid: ValidTokens, slots: _Slots, groups: Groups, alpha: float, positions: str, width: int | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    same = Groups(slots.group, groups.number)
    low, high = -same.max(-d), same.max(d)
    if positions == "all":
        ended = same.sum(torch.ones_like(slots.group)) < _width(valid.layout, width)
        low = torch.where(ended, low.clamp(max=0), low)
    w = 1 + (alpha - 1) * (d - low) / (high - low + FLOOR)
    w = w.repeat_interleave(slots.counts, output_size=valid.cells.numel())
    return valid.put(torch.zeros_like(w).index_put((slots.order,), w), dtype)


def _width(layout: Layout, width: int | None) -> int:
    if layout.width is not None:
        longest = layout.width
    else:
        longest = int(layout.cu_seqlens.diff().max()) if layout.num_sequences else 0
    if width is not None and width < longest:
        raise wrong("width", width, f"at least the longest row of this call, {longest}")
    return longest if width is None else width


def _batch(
    x: Tensor, name: str, group_ids: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, alpha: float,
    positions: str, width: int | None, memory_budget: int | None,
) -> tuple[ValidTokens, Groups, _Slots, int]:  # fmt: skip
    """Checked; x: [B, T, .] or [N, .]."""
    check_name("positions", positions, POSITIONS)
    if width is not None and positions != "all":
        raise wrong("width", width, f"None for positions {positions!r} (positions='all' uses it)")
    check_number("alpha", alpha, -FINITE, FINITE, accepted="a finite number, the largest weight")
    valid = tokens_of(x, name, mask, cu_seqlens)
    groups = as_groups(group_ids, valid.layout.cu_seqlens[1:])
    return valid, groups, _slots(valid, groups), budget_of(memory_budget, x)


def tw_grpo_weights(
    logits: Tensor,
    group_ids: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    alpha: float = 1.7,
    positions: str = "all",
    width: int | None = None,
    detach_weights: bool = True,
    memory_budget: int | None = None,
) -> Tensor:
    """w_t per token in [1, alpha], 0 in masked cells: [B, T, V] -> [B, T], or [N, V] -> [N] with cu_seqlens; fp32 (fp64
    of fp64 logits).

        L_itv = log softmax of row i at position t, -log V where the row has no token;  M_tv = mean_i L_itv of the group
        D_it = sum_v exp(x) - x - 1,  x = M_tv - L_itv cut to [-11, 11];  d_t = mean_i D_it
        w_t = 1 + (alpha - 1) (d_t - min d) / (max d - min d + 1e-8), min and max of the group

    A position is a column of the row, or of the row's part of a packed batch. A hole of the mask counts as the authors
    count the cells behind a row's end, so does a row without tokens (our reading).

    Args:
        logits: bf16, fp16, fp32 or fp64, aligned with the sampled tokens, at the temperature of the loss; finite in
            valid cells: a column of -inf gives NaN, as in the authors' code (slice the padding of a vocabulary off).
            Views as logits[:, :-1] are read in place, masked cells not at all.
        group_ids: integers [S]; groups must be whole in a call.
        mask: bool [B, T] or [N].
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        alpha: the largest weight: 1.7 in the authors' script, 1.4 and 1.5 are its defaults in their code.
        positions: what min and max are of: "all" positions up to width (authors' code), where those at which a group
            has ended have d = 0; "valid": those at which a row of the group has a token, so that padding does not
            matter.
        width: T of the whole batch for a part of it; None: T of this call, in a packed batch its longest row.
        detach_weights: False gives the weights the gradient they have in the authors' code, holding a few [tokens, V]
            in fp32. policy_loss takes weights as constants: add sum(w_t sg[loss_t]) / tokens, less its own value.
        memory_budget: bytes of the tiles of positions and columns in which all else is computed, as for
            linear_token_logprobs.
    """
    valid, groups, slots, budget = _batch(
        logits, "logits", group_ids, mask, cu_seqlens, alpha, positions, width, memory_budget
    )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if detach_weights:
        source, lse = logit_columns(logits.detach(), valid)
        d = _divergences(source, lse, valid, slots, budget)
    else:
        z = logits.reshape(-1, logits.shape[-1])[valid.cells[slots.order]].to(dtype)
        shared = slots.part(slice(None), dtype)
        d = _tile(z, z.logsumexp(1, keepdim=True), *shared, z.shape[1])[:, 0].double()
    return _weights(d, valid, slots, groups, alpha, positions, width, dtype)


@torch.no_grad()
def linear_tw_grpo_weights(
    hidden: Tensor,
    weight: Tensor,
    group_ids: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    alpha: float = 1.7,
    positions: str = "all",
    width: int | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """tw_grpo_weights of the logits (hidden @ weight^T + bias) / temperature, which are never held; no gradient; 4 N D
    V flops.

    Args:
        hidden: [B, T, D], or [N, D] with cu_seqlens.
        weight: [V, D] (without the padding of the vocabulary: weight[:v]).
        group_ids: integers [S]; groups must be whole in a call.
        mask: bool [B, T] or [N].
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        alpha: as for tw_grpo_weights.
        positions: as for tw_grpo_weights.
        width: as for tw_grpo_weights.
        bias: [V].
        temperature: a number, as for linear_token_logprobs.
        compute_dtype: as for linear_token_logprobs.
        memory_budget: as for linear_token_logprobs.
    """
    valid, groups, slots, budget = _batch(
        hidden, "hidden", group_ids, mask, cu_seqlens, alpha, positions, width, memory_budget
    )
    source, lse = head_columns(hidden, weight, valid, bias, compute_dtype, budget, temperature)
    d = _divergences(source, lse, valid, slots, budget)
    return _weights(d, valid, slots, groups, alpha, positions, width, source.dtype)
