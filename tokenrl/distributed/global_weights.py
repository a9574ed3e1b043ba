"""The weights of a batch that is split over data-parallel ranks and their micro-batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import wire
from ..batch.checks import check_constant, check_integers, check_name, check_number, check_positive
from ..batch.layout import Layout, layout_of
from ..errors import described, wrong
from ..losses.aggregation import span_weights
from ..ops import backends
from .agreement import Agreement
from .vocab_shard import as_group


@dataclass(frozen=True)
class Split:
    """How a trainer splits a batch: over so many data-parallel ranks, context-parallel ranks and micro-batches."""

    data: int = 1
    context: int = 1
    micro_batches: int = 1


# What each divides the sum of gradients by, of losses that hold weights of the whole batch.
AVERAGED_OVER: dict[str, Callable[[Split], int]] = {
    "sum": lambda split: 1,  # FSDP2 with set_gradient_divide_factor(1)
    "ddp": lambda split: split.data * split.context,  # its mesh, with the context ranks that are in it
    "fsdp": lambda split: split.data * split.context,
    "megatron": lambda split: split.micro_batches * split.data,  # a loss function that returns (loss, metrics)
    "megatron num_tokens": lambda split: split.micro_batches * split.data * split.context,  # with num_tokens = 1
    "accelerate": lambda split: split.micro_batches * split.data,  # gradient accumulation, then DDP's mean
    "deepspeed": lambda split: split.micro_batches * split.data,
}


def averaged_over(trainer: str, *, data: int = 1, context: int = 1, micro_batches: int = 1) -> int:
    """For averaged_over= of global_weights: by what a trainer's reduction divides the sum of the parts' gradients.

    Args:
        trainer: a name of AVERAGED_OVER.
        data: data-parallel ranks.
        context: context-parallel ranks.
        micro_batches: of each rank and optimizer step.

    Source: the trainers' code (notes).
    """
    check_name("trainer", trainer, AVERAGED_OVER)
    for name, count in (("data", data), ("context", context), ("micro_batches", micro_batches)):
        check_number(name, count, 1)
    return AVERAGED_OVER[trainer](Split(data, context, micro_batches))


def global_weights(
    aggregation: str,
    masks: Sequence[Tensor],
    *,
    group: dist.ProcessGroup | DeviceMesh,
    cu_seqlens: Sequence[Tensor] | None = None,
    advantages: Sequence[Tensor] | None = None,
    group_ids: Sequence[Tensor] | None = None,
    normalizer: float | Tensor | None = None,
    averaged_over: float = 1,
    dtype: torch.dtype = torch.float32,
    check: bool = True,
) -> list[Tensor]:
    """The weight of each token in the loss of the whole batch, so that the parts' losses and gradients add up to it:

        w = global_weights("group-mean", [mask for mask, ... in micro_batches], group_ids=..., group=dp_group)
        loss, metrics = policy_loss(..., token_weight=w[i], aggregation="token-sum")     # of micro-batch i

    Two exchanges: the numbers of sequences, and 24 bytes of each sequence.

    Args:
        aggregation: a mode of tokenrl.aggregation_weights, whose counts are those of all ranks and micro-batches; the
            groups of group_ids may lie on several.
        masks: of this rank's micro-batches, bool [B, T], or [N] beside cu_seqlens; as many as the rank has, one at
            least, all False where there is nothing.
        group: the data-parallel ranks.
        cu_seqlens: of each micro-batch, [S + 1].
        advantages: of each micro-batch, as for policy_loss.
        group_ids: of each micro-batch, as for policy_loss; they mean the same on all ranks.
        normalizer: as for policy_loss, of the whole batch; "seq-mean-token-sum-norm" needs it.
        averaged_over: by what the gradients are divided on their way, which is multiplied in: 1 where they are summed,
            tokenrl.distributed.averaged_over(trainer, ...) else. The loss and kl, entropy of its metrics hold it too.
        dtype: of the result.
        check: that the ranks agree on the mode, by one exchange of 256 bytes before.

    Returns:
        a weight [B, T] or [N] for each mask, 0 in masked cells.

    Source: our reading of each mode over a split batch.
    """
    if not isinstance(masks, Sequence) or not masks:
        raise wrong("masks", described(masks), "those of the micro-batches, one at least")
    group, device = as_group(group), masks[0].device
    with Agreement("global_weights", group, device, check) as agreed:
        check_positive("averaged_over", averaged_over)
        parts = {"cu_seqlens": cu_seqlens, "advantages": advantages, "group_ids": group_ids}
        layouts, own = _read(masks, parts)
        given = [name for name, x in parts.items() if x is not None and name != "cu_seqlens"]
        agreed.same(aggregation=aggregation, averaged_over=averaged_over, normalizer=normalizer, given=given)
    sizes, sequences = wire.all_gather_rows(own, group)
    lengths, signs, groups = sequences.unbind(1)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    tokens = torch.empty(int(bounds[-1]), dtype=torch.bool, device=device)
    whole = layout_of(tokens, mask=None, cu_seqlens=bounds, name="masks")
    weights = span_weights(
        aggregation, whole, advantages=None if advantages is None else whole.spread(signs.float()).contiguous(),
        group_ids=None if group_ids is None else groups, normalizer=normalizer,
        backend=backends.choose(None, device),
    )  # fmt: skip
    share = torch.where(weights.span_weight == 0, 0, weights.span_weight / weights.normalizer) * averaged_over
    first = sum(sizes[: group.rank()])
    mine = share[first : first + len(own)].to(dtype).split([layout.num_sequences for layout in layouts])
    return [
        torch.where(layout.valid(), layout.spread(of_sequences), 0).view(layout.shape)
        for layout, of_sequences in zip(layouts, mine, strict=True)
    ]


def _read(masks: Sequence[Tensor], parts: dict[str, Sequence[Tensor] | None]) -> tuple[list[Layout], Tensor]:
    """Layouts of the micro-batches; of their sequences, one after another, valid tokens, the sign of the advantage and
    the group, int64 [S, 3]."""
    for name, some in parts.items():
        if some is not None and (not isinstance(some, Sequence) or len(some) != len(masks)):
            raise wrong(name, described(some), f"one for each of the {len(masks)} masks")
    layouts, rows = [], []
    for k, mask in enumerate(masks):
        cu_seqlens, advantages, groups = (None if some is None else some[k] for some in parts.values())
        layout = layout_of(mask, mask=mask, cu_seqlens=cu_seqlens, name="masks")
        rows.append(torch.stack([_counts(layout), _signs(layout, advantages), _groups(layout, groups)], 1))
        layouts.append(layout)
    return layouts, torch.cat(rows)


def _counts(layout: Layout) -> Tensor:
    return _sums(layout, layout.valid().long())


def _sums(layout: Layout, x: Tensor) -> Tensor:
    """Of each sequence's tokens."""
    sums = x.cumsum(0)
    return torch.cat([sums.new_zeros(1), sums])[layout.cu_seqlens].diff()


def _signs(layout: Layout, advantages: Tensor | None) -> Tensor:
    if advantages is None:
        return torch.zeros_like(layout.cu_seqlens[1:])
    check_constant("advantages", advantages)
    flat = layout.flat_tokens_or_sequences("advantages", advantages, torch.float64)
    if flat.numel() == layout.num_tokens:
        flat = _sums(layout, torch.where(layout.valid(), flat, 0))
    return flat.sign().long()


def _groups(layout: Layout, group_ids: Tensor | None) -> Tensor:
    if group_ids is None:
        return torch.zeros_like(layout.cu_seqlens[1:])
    check_integers("group_ids", group_ids)
    return layout.flat_sequences("group_ids", group_ids, torch.int64)
