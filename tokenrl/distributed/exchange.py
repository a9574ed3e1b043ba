"""The statistics of a rank's columns -> those of the vocabulary, by one all-gather: the merge is the one of tiles."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import kernel_ops
from ..ops.kernel_ops import IGNORED
from ..ops.linear.token_logprobs import local_ids, merged
from . import wire

SUMMED_ROWS = 64  # whose kept logits are counted at a time, as a sum of bools copies them
Part = dict[str, Tensor]


def shard_ids(ids: Tensor, sizes: list[int], rank: int) -> Tensor:
    """ids of the whole vocabulary as those of a rank's part; elsewhere -1."""
    start = sum(sizes[:rank])
    return local_ids(ids, slice(start, start + sizes[rank]))


def of_vocabulary(
    own: Part, ids: Tensor, keep_mask: Tensor | None, outputs: list[str], group: dist.ProcessGroup, sizes: list[int]
) -> Part:
    """own: results of token_logprobs on this rank's columns, [N] and [N, K], differentiable or not; ids [N, K] of the
    whole vocabulary; keep_mask [N or 1, V_r]. In the results' own dtype, 0 in rows all of whose ids are ignored; by own
    alone differentiable, as the others are constants."""
    with torch.no_grad():
        parts = _exchanged(own, ids, keep_mask, outputs, group, sizes)
    parts[group.rank()] |= {name: own[name] for name in (*kernel_ops.ALWAYS, *outputs)}
    used, dtype = (ids != IGNORED).any(-1), own["lse"].dtype
    return {
        name: torch.where(used[:, None] if x.dim() > 1 else used, x, 0).to(dtype) if x.numel() else x.to(dtype)
        for name, x in merged(parts, ids, outputs).items()
    }


def _exchanged(
    own: Part, ids: Tensor, keep_mask: Tensor | None, outputs: list[str], group: dist.ProcessGroup, sizes: list[int]
) -> list[Part]:
    """Of every rank what merged() takes. Each sends 3 + K numbers a row, and one for each other output."""
    sent = {name: own[name] for name in (*kernel_ops.ALWAYS, *outputs)}
    if "mean_logit" in outputs:
        sent["kept"] = _kept(own["lse"], keep_mask, sizes[group.rank()])
    widths = [ids.shape[1] if x.dim() > 1 else 1 for x in sent.values()]
    packed = torch.cat([x.reshape(len(ids), width) for x, width in zip(sent.values(), widths, strict=True)], 1)
    parts, start = [], 0
    for of_rank, size in zip(wire.all_gather(packed, group), sizes, strict=True):
        columns = zip(sent.items(), of_rank.split(widths, 1), strict=True)
        part = {name: found.reshape(x.shape) for (name, x), found in columns}
        parts.append(part | {"here": (ids >= start) & (ids < start + size)})
        start += size
    return parts


def _kept(like: Tensor, keep_mask: Tensor | None, size: int) -> Tensor:
    """How many logits of each row are in the vocabulary."""
    if keep_mask is None:
        return torch.full_like(like, size)
    counts = torch.cat([some.sum(-1) for some in keep_mask.split(SUMMED_ROWS)])
    return counts.to(like.dtype).expand_as(like)
