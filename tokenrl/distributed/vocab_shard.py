"""VocabShard: the columns of the logits, or rows of the head, that each rank of a group holds."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.functional import pad

from .. import wire
from ..batch.checks import as_saved, check_number, check_tensor
from ..errors import described, wrong
from ..logprobs import from_hidden
from ..logprobs.from_hidden import HeadArguments
from ..logprobs.from_logits import DTYPES
from ..logprobs.token_stats import TokenStats
from ..ops.backends import Backend
from ..ops.linear.gemm import sum_dtype
from ..ops.linear.head import HeadInputs
from . import (
    divergence_vocabulary_parallel,
    linear_divergence_vocabulary_parallel,
    linear_vocabulary_parallel,
    policy_vocabulary_parallel,
    vocabulary_parallel,
)
from .agreement import Agreement
from .said import agree_on_preference
from .vocab_ranks import ShardInputs, VocabRanks

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

    From hidden states (each of these takes the two by name):
    sequence_parallel: hidden is this rank's tokens, [N / W, D] or [B, T / W, D], those of the ranks side by side, as
    many on each; it is gathered, and its gradient scattered as it is summed. ids, a temperature per row, keep_mask per
    row and all else are of all tokens. False: hidden is the same on all ranks, and its gradient too.
    hidden_grad_dtype: in which the ranks' shares of hidden's gradient travel and are summed. None: fp32, or fp64;
    torch.bfloat16 halves the bytes and doubles the rounding.
    """

    def __init__(
        self, group: dist.ProcessGroup | DeviceMesh, sizes: Sequence[int], *, sequence_parallel: bool = False,
        hidden_grad_dtype: torch.dtype | None = None,
    ):  # fmt: skip
        self.group = as_group(group)
        world, self.rank = self.group.size(), self.group.rank()
        accepted = f"{world} numbers of columns, one per rank of the group"
        if not isinstance(sizes, (list, tuple)):
            raise wrong("sizes", described(sizes), accepted)
        if len(sizes) != world or any(not isinstance(size, int) or size < 0 for size in sizes) or sum(sizes) == 0:
            raise wrong("sizes", list(sizes), accepted)
        self.sizes = [int(size) for size in sizes]
        if hidden_grad_dtype not in (None, *DTYPES):
            raise wrong("hidden_grad_dtype", hidden_grad_dtype, f"None, {', '.join(map(str, DTYPES))}")
        self.sequence_parallel, self.hidden_grad_dtype = sequence_parallel, hidden_grad_dtype

    @classmethod
    def even(cls, vocab: int, group: dist.ProcessGroup | DeviceMesh, **how: Any) -> "VocabShard":
        check_number("vocab", vocab, 1)
        group = as_group(group)
        part = -(-vocab // group.size())
        return cls(group, _cut(vocab, part, group.size()), **how)

    @classmethod
    def megatron(cls, vocab: int, group: dist.ProcessGroup | DeviceMesh, **how: Any) -> "VocabShard":
        check_number("vocab", vocab, 1)
        group = as_group(group)
        multiple = MEGATRON_MULTIPLE * group.size()
        padded = -(-vocab // multiple) * multiple
        return cls(group, _cut(vocab, padded // group.size(), group.size()), **how)

    @classmethod
    def of(
        cls, size: int, group: dist.ProcessGroup | DeviceMesh, device: torch.device | str = "cpu", **how: Any
    ) -> "VocabShard":
        """device: of the group's collectives, "cuda" for NCCL."""
        check_number("size", size, 0)
        group = as_group(group)
        return cls(group, wire.all_gather(torch.tensor([size], device=device), group).view(-1).tolist(), **how)

    @classmethod
    def of_dtensor(cls, x: Tensor, dim: int = 0, **how: Any) -> "VocabShard":
        """x: a DTensor, sharded on dim, 0 of a weight [V, D] or -1 of logits, and replicated elsewhere. No collective;
        the ops take x.to_local()."""
        if not isinstance(x, DTensor):
            raise wrong("x", described(x), "a DTensor")
        dim %= x.dim()
        split = [(place, k) for k, place in enumerate(x.placements) if not isinstance(place, Replicate)]
        if len(split) != 1 or type(split[0][0]) is not Shard or split[0][0].dim != dim:
            accepted = f"Shard({dim}) and else Replicate (inside the module's forward, or after unshard())"
            raise wrong("x", f"placements {list(x.placements)}", accepted)
        return cls.even(x.shape[dim], x.device_mesh.get_group(split[0][1]), **how)

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
        own = x if x.shape[dim] == self.size else x.narrow(dim, 0, self.size)
        if self.size:
            return own
        return pad(own, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, 1])  # unlike cat, autocast lets it be

    def own_keep(self, keep_mask: Tensor | None, like: Tensor) -> Tensor | None:
        if self.size == 0:
            rows = () if keep_mask is None else keep_mask.shape[:-1]
            return torch.zeros(*rows, 1, dtype=torch.bool, device=like.device)
        return None if keep_mask is None else self.own("keep_mask", keep_mask, -1)

    def head_arguments(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float | Tensor, softcap: float | None,
        logit_scale: float, keep_mask: Tensor | None, compute_dtype: torch.dtype | None, memory_budget: int | None,
        main_grad: Tensor | None,
    ) -> HeadArguments:  # fmt: skip
        """As those of a head on one rank: `like` is of all tokens and of the whole vocabulary."""
        check_local("hidden", hidden)
        weight = self.own("weight", weight, 0)
        bias, main_grad = (
            None if x is None else self.own(name, x, 0) for name, x in (("bias", bias), ("main_grad", main_grad))
        )
        rows = self.rows_of(hidden)
        head = from_hidden.head_arguments(
            hidden.new_empty(()).expand(*rows, hidden.shape[-1]) if self.sequence_parallel else hidden,
            weight, bias, temperature, softcap, logit_scale, self.own_keep(keep_mask, hidden), compute_dtype,
            memory_budget, main_grad,
        )  # fmt: skip
        like = head.like.new_empty(()).expand(*rows, self.total)
        return replace(head, like=like, hidden=as_saved(hidden).reshape(-1, hidden.shape[-1]))

    def rows_of(self, hidden: Tensor) -> tuple[int, ...]:
        """How many tokens there are, of how many sequences."""
        *sequences, tokens = hidden.shape[:-1]
        return *sequences, tokens * (self.group.size() if self.sequence_parallel else 1)

    def inputs(self, chosen: Backend, head: HeadInputs, sequences: int, reduce_hidden_grad: bool) -> ShardInputs:
        """What the ops take beside the head."""
        if self.sequence_parallel and not reduce_hidden_grad:
            raise wrong("reduce_hidden_grad", "False beside sequence_parallel", "True: a share has no place of its own")
        how = "reduce_scatter" if self.sequence_parallel else "all_reduce" if reduce_hidden_grad else "none"
        dtype = self.hidden_grad_dtype or sum_dtype(head.dtype)
        namespace = chosen.namespace or ""
        return ShardInputs(namespace, self.group.group_name, self.sizes, how, str(dtype)[6:], sequences)

    def token_logprobs(self, logits: Tensor, ids: Tensor, **how: Any) -> TokenStats:
        check_local("logits", logits)
        return vocabulary_parallel.token_logprobs(self, logits, ids, **how)

    def linear_token_logprobs(self, hidden: Tensor, weight: Tensor, ids: Tensor, **how: Any) -> TokenStats:
        return linear_vocabulary_parallel.linear_token_logprobs(self, hidden, weight, ids, **how)

    def token_divergences(
        self, kinds: Any, pair: tuple[Tensor, Tensor], options: Any, row_mask: Tensor | None, backend: str | None,
        check: bool,
    ) -> list[Tensor]:  # fmt: skip
        check_local("logits", pair[0])
        return divergence_vocabulary_parallel.token_divergences(self, kinds, pair, options, row_mask, backend, check)

    def agree_on_preference(self, agreed: Agreement, *call: Any) -> None:
        agreed.same(sizes=self.sizes)
        agree_on_preference(agreed, *call)

    def ranks(self, like: Tensor, reduce_hidden_grad: bool, chosen: Backend, head: HeadInputs) -> VocabRanks:
        """What passes over chunks ask; like: hidden as it was given, [.., D]."""
        return VocabRanks(self.inputs(chosen, head, like.shape[:-2].numel(), reduce_hidden_grad))

    def agree_on_divergence(self, agreed: Agreement, *call: Any) -> None:
        linear_divergence_vocabulary_parallel.agree(self, agreed, *call)

    def linear_divergence(
        self, like: Tensor, reduce_hidden_grad: bool, chosen: Backend, head: HeadInputs, *call: Any
    ) -> tuple[Tensor, ...]:
        """like: hidden as it was given, [.., D]."""
        given = self.inputs(chosen, head, like.shape[:-2].numel(), reduce_hidden_grad)
        return linear_divergence_vocabulary_parallel.linear_divergence(given, chosen, head, *call)

    def agreement(self, what: str, like: Tensor, check: bool) -> Agreement:
        check_local("hidden", like)
        return Agreement(what, self.group, like.device, check)

    def agree(self, agreed: Agreement, *call: Any) -> None:
        policy_vocabulary_parallel.agree(self, agreed, *call)

    def linear_policy_loss(self, reduce_hidden_grad: bool, *call: Any) -> tuple[Tensor, ...]:
        return policy_vocabulary_parallel.linear_policy_loss(self, reduce_hidden_grad, *call)

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
