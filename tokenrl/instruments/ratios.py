"""The ratios of a batch and what its objective clips, by the position of a token in its sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..objectives.policy import Objective
from .parity.held import Held
from .rollout_batch import RolloutBatch

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MOST_BINS = 48


@dataclass(frozen=True)
class ByPosition:
    """One entry per bin of positions. position: the middle of each, counted from 1 over valid tokens. quantiles: by
    QUANTILES, of the objective's ratio e^s. low, high, dual: the share of tokens on which that bound is active."""

    objective: str
    position: list[float]
    tokens: list[int]
    quantiles: dict[float, list[float]]
    low: list[float]
    high: list[float]
    dual: list[float]


def by_position(batch: RolloutBatch, row: Objective | None = None, bins: int = MOST_BINS) -> ByPosition:
    """Of a batch with log-probs or a head, by its own objective or another; computed on the reference, in fp32."""
    batch = batch.under(row)
    row, valid = batch.objective, batch.layout.valid()
    found, position = Held(batch, ()).seen(torch.float32), positions(batch)[valid]
    ratio, *clipped = (x[valid] for x in (found.s.exp(), *found.clipped()))
    longest = int(position.max()) if position.numel() else 0
    width = max(1, -(-longest // bins))
    which = (position - 1) // width
    inside = [which == number for number in range(-(-longest // width))]
    inside = [some for some in inside if some.any()]
    levels = torch.tensor(QUANTILES, dtype=ratio.dtype, device=ratio.device)
    each = [torch.quantile(ratio[some], levels).tolist() for some in inside]
    low, high, dual = ([bound[some].float().mean().item() for some in inside] for bound in clipped)
    return ByPosition(
        row.name, [position[some].float().mean().item() for some in inside], [int(some.sum()) for some in inside],
        {level: [values[i] for values in each] for i, level in enumerate(QUANTILES)}, low, high, dual,
    )  # fmt: skip


def positions(batch: RolloutBatch) -> Tensor:
    """[N]: from 1, over the valid tokens of each sequence; of the others, that of the valid token before."""
    valid = batch.layout.valid().cumsum(0)
    before = torch.cat([valid.new_zeros(1), valid])[batch.layout.cu_seqlens[:-1]]
    return valid - batch.layout.spread(before)
