"""The statistics of a rank's columns -> those of the vocabulary, by one all-gather: the merge is the one of tiles."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .. import wire
from ..ops import kernel_ops
from ..ops.kernel_ops import IGNORED, RESULTS
from ..ops.linear.token_logprobs import local_ids, merged

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
    return start(own, ids, keep_mask, outputs, group, sizes)()


def start(
    own: Part, ids: Tensor, keep_mask: Tensor | None, outputs: list[str], group: dist.ProcessGroup, sizes: list[int]
) -> Callable[[], Part]:
    """The same when it is called; the numbers are on their way until then."""
    with torch.no_grad():
        receive = _sent(own, ids, keep_mask, outputs, group, sizes)

    def finish() -> Part:
        parts = receive()
        parts[group.rank()] |= {name: own[name] for name in (*kernel_ops.ALWAYS, *outputs)}
        used, dtype = (ids != IGNORED).any(-1), own["lse"].dtype
        return {
            name: torch.where(used[:, None] if x.dim() > 1 else used, x, 0).to(dtype) if x.numel() else x.to(dtype)
            for name, x in merged(parts, ids, outputs).items()
        }

    return finish


def in_order(found: Part) -> tuple[Tensor, ...]:
    """The results of an op; those of an order are made elsewhere."""
    orders = {"is_top1": torch.bool, "rank": torch.int64}
    return tuple(found[name].to(orders.get(name, found[name].dtype)) for name in RESULTS)


def _sent(
    own: Part, ids: Tensor, keep_mask: Tensor | None, outputs: list[str], group: dist.ProcessGroup, sizes: list[int]
) -> Callable[[], list[Part]]:
    """Of every rank what merged() takes. Each sends 3 + K numbers a row, and one for each other output."""
    sent = {name: own[name] for name in (*kernel_ops.ALWAYS, *outputs)}
    if "mean_logit" in outputs:
        sent["kept"] = _kept(own["lse"], keep_mask, sizes[group.rank()])
    widths = [ids.shape[1] if x.dim() > 1 else 1 for x in sent.values()]
    packed = torch.cat([x.reshape(len(ids), width) for x, width in zip(sent.values(), widths, strict=True)], 1)
    every = wire.start_all_gather(packed, group)

    def receive() -> list[Part]:
        parts, first = [], 0
        for of_rank, size in zip(every(), sizes, strict=True):
            columns = zip(sent.items(), of_rank.split(widths, 1), strict=True)
            part = {name: found.reshape(x.shape) for (name, x), found in columns}
            parts.append(part | {"here": (ids >= first) & (ids < first + size)})
            first += size
        return parts

    return receive


def _kept(like: Tensor, keep_mask: Tensor | None, size: int) -> Tensor:
    """How many logits of each row are in the vocabulary."""
    if keep_mask is None:
        return torch.full_like(like, size)
    counts = torch.cat([some.sum(-1) for some in keep_mask.split(SUMMED_ROWS)])
    return counts.to(like.dtype).expand_as(like)
