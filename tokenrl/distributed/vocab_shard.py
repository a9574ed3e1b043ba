"""VocabShard: the columns of the logits, or rows of the head, that each rank of a group holds."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.functional import pad

from ..batch.checks import check_number, check_tensor
from ..errors import described, wrong
from ..logprobs.token_stats import TokenStats
from . import linear_vocabulary_parallel, vocabulary_parallel, wire

MEGATRON_MULTIPLE = 128  # of the vocabulary, times the group's size


class VocabShard:
    """For `vocab=` of token_logprobs and linear_token_logprobs: a vocabulary side by side on the ranks of a group.

    group: a ProcessGroup, or a DeviceMesh of one dimension. sizes: how many columns each rank holds, in the order of
    ranks, without padding; 0 is allowed. A rank may hand in more than its size: what is beyond is padding, which is not
    read and gets no gradient.

        VocabShard.even(151936, group)            torch.chunk's rule, as DTensor's
        VocabShard.megatron(151936, group)        padded to a multiple of 128 W, the last ranks hold the padding
        VocabShard.of(weight.shape[0], group)     asks the ranks, one collective
        VocabShard.of_dtensor(weight)             of its mesh and placements
    """

    def __init__(self, group: dist.ProcessGroup | DeviceMesh, sizes: Sequence[int]):
        self.group = as_group(group)
        world, self.rank = self.group.size(), self.group.rank()
        if len(sizes) != world or any(not isinstance(size, int) or size < 0 for size in sizes) or sum(sizes) == 0:
            raise wrong("sizes", list(sizes), f"{world} numbers of columns, one per rank of the group")
        self.sizes = [int(size) for size in sizes]

    @classmethod
    def even(cls, vocab: int, group: dist.ProcessGroup | DeviceMesh) -> "VocabShard":
        check_number("vocab", vocab, 1)
        group = as_group(group)
        part = -(-vocab // group.size())
        return cls(group, _cut(vocab, part, group.size()))

    @classmethod
    def megatron(cls, vocab: int, group: dist.ProcessGroup | DeviceMesh) -> "VocabShard":
        check_number("vocab", vocab, 1)
        group = as_group(group)
        multiple = MEGATRON_MULTIPLE * group.size()
        padded = -(-vocab // multiple) * multiple
        return cls(group, _cut(vocab, padded // group.size(), group.size()))

    @classmethod
    def of(cls, size: int, group: dist.ProcessGroup | DeviceMesh, device: torch.device | str = "cpu") -> "VocabShard":
        """device: of the group's collectives, "cuda" for NCCL."""
        check_number("size", size, 0)
        group = as_group(group)
        return cls(group, wire.all_gather(torch.tensor([size], device=device), group).view(-1).tolist())

    @classmethod
    def of_dtensor(cls, x: Tensor, dim: int = 0) -> "VocabShard":
        """x: a DTensor, sharded on dim, 0 of a weight [V, D] or -1 of logits, and replicated elsewhere. No collective;
        the ops take x.to_local()."""
        if not isinstance(x, DTensor):
            raise wrong("x", described(x), "a DTensor")
        dim %= x.dim()
        split = [(place, k) for k, place in enumerate(x.placements) if not isinstance(place, Replicate)]
        if len(split) != 1 or type(split[0][0]) is not Shard or split[0][0].dim != dim:
            accepted = f"Shard({dim}) and else Replicate (inside the module's forward, or after unshard())"
            raise wrong("x", f"placements {list(x.placements)}", accepted)
        return cls.even(x.shape[dim], x.device_mesh.get_group(split[0][1]))

    @property
    def size(self) -> int:
        return self.sizes[self.rank]

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def own(self, name: str, x: Tensor, dim: int) -> Tensor:
        """x without padding. A rank without columns gets one, which own_keep leaves out of the vocabulary: no kernel
        needs to know of it."""
        check_local(name, x)
        if x.dim() == 0 or x.shape[dim] < self.size:
            accepted = f"at least {self.size} columns of the vocabulary, those of rank {self.rank}"
            raise wrong(name, f"shape {list(x.shape)}", accepted)
        own = x.narrow(dim, 0, self.size)
        if self.size:
            return own
        return pad(own, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, 1])  # unlike cat, autocast lets it be

    def own_keep(self, keep_mask: Tensor | None, like: Tensor) -> Tensor | None:
        if self.size == 0:
            return torch.zeros(1, dtype=torch.bool, device=like.device)
        return None if keep_mask is None else self.own("keep_mask", keep_mask, -1)

    def token_logprobs(self, logits: Tensor, ids: Tensor, **how: Any) -> TokenStats:
        check_local("logits", logits)
        return vocabulary_parallel.token_logprobs(self, logits, ids, **how)

    def linear_token_logprobs(self, hidden: Tensor, weight: Tensor, ids: Tensor, **how: Any) -> TokenStats:
        check_local("hidden", hidden)
        return linear_vocabulary_parallel.linear_token_logprobs(self, hidden, weight, ids, **how)

    def __repr__(self) -> str:
        return f"VocabShard(sizes={self.sizes}, rank={self.rank})"


def check_local(name: str, x: Tensor) -> None:
    if isinstance(x, DTensor):
        raise wrong(name, "a DTensor beside vocab", f"the local part ({name}.to_local())")
    check_tensor(name, x)


def as_group(group: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise wrong("group", f"a mesh of {group.ndim} dimensions", "one of 1 (mesh['tp'])")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise wrong("group", described(group), "a ProcessGroup or a 1-d DeviceMesh that this process is in")
    return group


def _cut(vocab: int, part: int, world: int) -> list[int]:
    return [min(max(vocab - rank * part, 0), part) for rank in range(world)]
