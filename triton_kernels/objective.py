"""Op objective: loss, coef = dloss/dlogp and metrics of a token-level objective, in one launch.

One program per sequence. The last program to finish adds up in double what the sequences left, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..objectives.gates import GATES as FORMULAS
from ..objectives.gates import MAX_PARAMS
from ..objectives.metrics import NOTHING, RAW
from . import launch
from .gates import GATES, NEED_POSITION
from .scalar import wide_exponential
from .spans import Spans, fill_outside, is_last, sequence, without_padding
from .walks import Numbers, Tokens, prefix_walk, segment_walk, span_walk, suffix_walk

NUM_SUMS = tl.constexpr(len(RAW) + 1)  # the metrics, then the loss
RATIO_MIN, RATIO_MAX = tl.constexpr(RAW.index("ratio_min")), tl.constexpr(RAW.index("ratio_max"))
LOSS = tl.constexpr(len(RAW))
SUM_ROWS = tl.constexpr(16)


@triton.jit
def publish(partials, i, num_sequences, sums):
    """Stores the sums of one sequence, float64 [NUM_SUMS, S]."""
    for k in tl.static_range(NUM_SUMS):
        if k == RATIO_MIN:
            value = wide_exponential(tl.min(sums[k], 0))
        elif k == RATIO_MAX:
            most = tl.max(sums[k], 0)
            value = tl.where(most == -float("inf"), most, wide_exponential(most))
        else:
            value = tl.sum(sums[k], 0)
        tl.store(partials + i + k * num_sequences, value.to(tl.float64))


@triton.jit
def finish(partials, num_sequences, loss, metrics, TILE: tl.constexpr):
    """Sums, minimum and maximum over the sequences."""
    row = tl.arange(0, SUM_ROWS)
    is_min, is_max = (row == RATIO_MIN)[:, None], (row == RATIO_MAX)[:, None]
    nothing = tl.where(is_min, float("inf"), tl.where(is_max, -float("inf"), 0.0)).to(tl.float64)
    total = nothing + tl.zeros((SUM_ROWS, TILE), tl.float64)
    for first in range(0, num_sequences, TILE):
        i = first + tl.arange(0, TILE)
        cells = row.to(tl.int64)[:, None] * num_sequences + i[None, :]
        known = (row < NUM_SUMS)[:, None] & (i < num_sequences)[None, :]
        # Not from L1: other multiprocessors wrote these.
        part = tl.load(partials + cells, mask=known, other=0.0, cache_modifier=".cg")
        part = tl.where(known, part, nothing)
        low, high = tl.where(part < total, part, total), tl.where(part > total, part, total)
        total = tl.where(is_min, low, tl.where(is_max, high, total + part))
    lowest, highest = tl.min(total, 1), tl.max(total, 1)
    result = tl.where(row == RATIO_MIN, lowest, tl.where(row == RATIO_MAX, highest, tl.sum(total, 1)))
    tl.store(metrics + row, result.to(metrics.dtype.element_ty), mask=row < LOSS)
    tl.store(loss, tl.sum(tl.where(row == LOSS, result, 0.0), 0).to(loss.dtype.element_ty))


@triton.jit
def of_sequence(tokens, span_weight, normalizer, i, T: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Weight and advantage that all tokens of sequence i share."""
    share = tl.load(span_weight + i)
    weight = tl.where(share == 0, 0.0, share / tl.load(normalizer)).to(T)
    advantage = tl.zeros((), T)
    if tokens.advantages is not None and not PER_TOKEN:
        advantage = tl.load(tokens.advantages + i)
    return weight, advantage


@triton.jit
def objective_kernel(
    spans, tokens, span_weight, normalizer, coef, scratch, counts, partials, ticket, loss, metrics, clamp: tl.float64,
    cap: tl.float64, p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64, p4: tl.float64, p5: tl.float64,
    STATISTIC: tl.constexpr, FLOW: tl.constexpr, GATE: tl.constexpr, NUM_PARAMS: tl.constexpr, PER_TOKEN: tl.constexpr,
    POSITION: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = coef.dtype.element_ty
    i = tl.program_id(0)
    begin, end = sequence(spans, i)
    fill_outside(spans, i, begin, end, coef, BLOCK)
    begin, end = without_padding(spans, begin, end, coef, BLOCK)
    weight, advantage = of_sequence(tokens, span_weight, normalizer, i, T, PER_TOKEN)
    params = (
        tl.full((), p0, T), tl.full((), p1, T), tl.full((), p2, T), tl.full((), p3, T), tl.full((), p4, T),
        tl.full((), p5, T),
    )  # fmt: skip
    numbers = Numbers(tl.full((), clamp, T), tl.full((), cap, T), params)
    if STATISTIC != "span_sum" and STATISTIC != "span_mean":
        sums = prefix_walk(
            spans, tokens, numbers, weight, advantage, begin, end, coef, scratch, STATISTIC, FLOW, GATE, NUM_PARAMS,
            PER_TOKEN, POSITION, BLOCK,
        )  # fmt: skip
        if FLOW == "through" and STATISTIC != "token":
            suffix_walk(spans, tokens, numbers.clamp, begin, end, coef, scratch, BLOCK)
    elif spans.starts is None:
        sums = span_walk(
            spans, tokens, numbers, weight, advantage, begin, end, coef, STATISTIC, FLOW, GATE, NUM_PARAMS, PER_TOKEN,
            POSITION, BLOCK,
        )  # fmt: skip
    else:
        sums = segment_walk(
            spans, tokens, numbers, weight, advantage, begin, end, coef, scratch, counts, STATISTIC, FLOW, GATE,
            NUM_PARAMS, PER_TOKEN, BLOCK,
        )  # fmt: skip
    publish(partials, i, spans.num_sequences, sums)
    if is_last(ticket):
        finish(partials, spans.num_sequences, loss, metrics, TILE)


def _nothing(logp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result of a batch without sequences."""
    metrics = torch.tensor(NOTHING, dtype=torch.float64, device=logp.device)
    return logp.new_zeros(()), torch.zeros_like(logp), metrics


def objective(
    logp: Tensor, old_logp: Tensor, advantages: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor,
    starts: Tensor | None, span_weight: Tensor, normalizer: Tensor, token_weight: Tensor | None, statistic: str,
    flow: str, gate: str, params: list[float], param_tensors: list[Tensor | None], clamp: float, cap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss 0-d, coef [N], metrics [12]); contract: tokenrl/ops/kernel_ops.py, formulas: tokenrl/ops/reference.py."""
    num_tokens, sequences = logp.numel(), cu_seqlens.numel() - 1
    if sequences == 0:
        return _nothing(logp)
    coef, loss = torch.empty_like(logp), logp.new_empty(())
    metrics = logp.new_empty(len(RAW), dtype=torch.float64)
    segmented_span = statistic.startswith("span") and starts is not None
    needs_scratch = segmented_span or (statistic.startswith("prefix") and flow == "through")
    padding, formula = MAX_PARAMS - len(params), FORMULAS[gate]
    vanishes = 1 if formula.uses_advantages and formula.vanishes else None
    block = launch.block_of(statistic, num_tokens, sequences)
    with launch.on_device_of(logp):
        objective_kernel[(sequences,)](
            Spans(cu_seqlens, mask, starts, num_tokens, sequences),
            Tokens(logp, old_logp, advantages, token_weight, (*param_tensors, *[None] * padding), vanishes),
            span_weight, normalizer, coef, torch.empty_like(logp) if needs_scratch else None,
            torch.empty_like(logp, dtype=torch.int32) if segmented_span else None,
            logp.new_empty(NUM_SUMS.value * sequences, dtype=torch.float64),
            launch.ticket(logp), loss, metrics, clamp, cap, *params, *[0.0] * padding,
            STATISTIC=statistic, FLOW=flow, GATE=GATES[gate], NUM_PARAMS=len(params),
            PER_TOKEN=advantages is not None and advantages.numel() == num_tokens, POSITION=gate in NEED_POSITION,
            BLOCK=block, TILE=min(triton.next_power_of_2(sequences), 64), num_warps=launch.token_warps(block),
            maxnreg=128 if logp.dtype == torch.float32 else 192,
        )  # fmt: skip
    return loss, coef, metrics
