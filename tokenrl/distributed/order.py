"""rank and is_top1 of ids whose competitors lie on other ranks: two small exchanges, of integers the second."""

import torch
import torch.distributed as dist
from torch import Tensor

from .. import wire
from ..ops.kernel_ops import IGNORED

NAMES = ("is_top1", "rank")
ROWS = 64  # compared at a time


def of(
    logits: Tensor, ids: Tensor, keep_mask: Tensor | None, start: int, size: int, group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """logits [N, V_r], raw, from column start of the vocabulary on; ids [N, K] of the whole one. As token_logprobs
    has them: of kept logits, the first of equal ones first; 0 and False where an id is ignored."""
    kept = logits if keep_mask is None else torch.where(keep_mask, logits, -torch.inf)
    wide = torch.promote_types(logits.dtype, torch.float32)
    here = (ids >= start) & (ids < start + size)
    own = torch.where(here, kept.gather(1, (ids - start).clamp(0, max(size - 1, 0))).to(wide), 0)
    value = wire.all_gather(own, group).sum(0)  # one rank has it, the others 0
    counts = torch.zeros(2, *ids.shape, dtype=torch.int64, device=ids.device)
    columns = torch.arange(start, start + size, device=ids.device)
    for first in range(0, len(ids), ROWS):
        at = slice(first, first + ROWS)
        for k in range(ids.shape[1]):
            x, beside = kept[at, :size].to(wide), value[at, k, None]
            counts[0, at, k] = (x > beside).sum(-1)
            counts[1, at, k] = ((x == beside) & (columns < ids[at, k, None])).sum(-1)
    above, before = wire.all_gather(counts, group).sum(0)
    used = ids != IGNORED
    return {"is_top1": used & (above == 0) & (before == 0), "rank": torch.where(used, above + 1, 0)}
