"""ContextShard: the tokens of a packed batch that each rank of a group holds, under context parallelism."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import wire
from ..batch.checks import check_name, check_tensor
from ..errors import described, wrong
from ..ops.derivatives import call, register_derivative
from . import policy_context_parallel
from .agreement import Agreement
from .said import agree_on_preference
from .vocab_shard import as_group
from .vocabulary_parallel import LIBRARY, NAMESPACE, ONCE

OP = "context_gathered"
LAYOUTS = ("contiguous", "zigzag", "zigzag_per_sequence")
Piece = tuple[int, int]  # first token, number of tokens


class ContextShard:
    """Whose tokens are where: gathers log-probs, 4 bytes a token, so that any loss of tokenrl is that of the whole
    batch, on every rank, with the own part of its gradient.

        context = ContextShard(group, cu_seqlens, "zigzag_per_sequence")
        loss, metrics = tokenrl.policy_loss("ctpo", logp, old_logp, advantages, cu_seqlens=cu_seqlens, context=context)
        loss.backward()                                           # logp [n] is of the own tokens: its part, whole

        whole = context.gathered(logp)                            # [N], differentiable: for any other loss

    The loss and its metrics are those of the batch, the same bits on all ranks of the group: they are neither summed
    nor averaged over it. Gradients of parameters are summed over the group as for any loss of parts.

    group: a ProcessGroup, or a DeviceMesh of one dimension. cu_seqlens: integers [S + 1] of the whole batch, or the
    number of its tokens. layout:

        "contiguous"            rank r has the r-th of W parts of ceil(N / W) tokens
        "zigzag"                parts r and 2 W - 1 - r of 2 W parts of the batch
        "zigzag_per_sequence"   the same of each sequence (Megatron, Transformer Engine, slime)
        pieces                  instead of a name: of each rank its runs (first token, number of tokens), in its order
    """

    def __init__(
        self, group: dist.ProcessGroup | DeviceMesh, cu_seqlens: Tensor | int,
        layout: str | Sequence[Sequence[Piece]] = "contiguous",
    ):  # fmt: skip
        self.group = as_group(group)
        self.rank, world = self.group.rank(), self.group.size()
        bounds = [0, cu_seqlens] if isinstance(cu_seqlens, int) else _bounds(cu_seqlens)
        self.tokens = bounds[-1]
        if isinstance(layout, str):
            check_name("layout", layout, LAYOUTS)
            self.pieces = _pieces(layout, bounds, world)
        else:
            self.pieces = [[(int(first), int(count)) for first, count in runs] for runs in layout]
            _check_partition(self.pieces, self.tokens, world)

    @property
    def counts(self) -> list[int]:
        """Tokens of each rank."""
        return [sum(count for _, count in runs) for runs in self.pieces]

    def index(self, device: torch.device | str = "cpu", rank: int | None = None) -> Tensor:
        """int64: where a rank's tokens, None: this one's, are in the batch."""
        return _index(self.pieces[self.rank if rank is None else rank], device)

    def take(self, x: Tensor) -> Tensor:
        """This rank's tokens [n, ...] of x [N, ...]; ids are shifted before."""
        self._check("x", x, self.tokens)
        return x[self.index(x.device)]

    def gathered(self, x: Tensor, *, check: bool = True) -> Tensor:
        """[N, ...] of this rank's x [n, ...], in the order of the batch. One exchange; the backward has none and gives
        each rank the gradient of its own tokens, not their sum over ranks: every rank has the whole loss.

        check: that the ranks agree on the batch and on what they hand in, by an exchange of 256 bytes before it.
        """
        with Agreement("gathered", self.group, x.device, check) as agreed:
            self._check("x", x, self.counts[self.rank])
            agreed.same(pieces=self.pieces, dtype=x.dtype, shape=list(x.shape[1:]))
        runs = [len(pieces) for pieces in self.pieces]
        return call(NAMESPACE, OP, x, self.group.group_name, runs, [n for runs in self.pieces for p in runs for n in p])

    def agreement(self, what: str, like: Tensor, check: bool) -> Agreement:
        return Agreement(what, self.group, like.device, check)

    def of_batch(
        self, logp: Tensor, beside: Tensor | None, check: bool, name: str = "entropy"
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs, and the argument of that name beside them, [N] of this rank's [n]."""
        return policy_context_parallel.of_batch(self, logp, beside, check, name)

    def hidden_of_batch(self, hidden: Tensor) -> Tensor:
        """Stands for the batch's [N, D], of this rank's [n, D]: their shape, dtype and device on one number."""
        self._check("hidden", hidden, self.counts[self.rank])
        return hidden.new_empty(()).expand(self.tokens, *hidden.shape[1:])

    def agree(self, agreed: Agreement, *loss: Any) -> None:
        policy_context_parallel.agree(self, agreed, *loss)

    def agree_on_preference(self, agreed: Agreement, *loss: Any) -> None:
        agreed.same(pieces=self.pieces)
        agree_on_preference(agreed, *loss)

    def linear_policy_loss(self, vocab: Any, reduce_hidden_grad: bool, *loss: Any) -> tuple[Tensor, ...]:
        return policy_context_parallel.linear_policy_loss(self, vocab, reduce_hidden_grad, *loss)

    def _check(self, name: str, x: Tensor, count: int) -> None:
        check_tensor(name, x)
        if x.dim() == 0 or x.shape[0] != count:
            raise wrong(name, f"shape {list(x.shape)}", f"{count} tokens first, of pieces {self.pieces[self.rank]}")


def _index(pieces: Sequence[Piece], device: torch.device | str) -> Tensor:
    return torch.cat([torch.arange(0), *(torch.arange(first, first + count) for first, count in pieces)]).to(device)


def _read(runs: list[int], numbers: list[int]) -> list[list[Piece]]:
    """The pieces of each rank: so many, of two numbers each."""
    pieces = iter(zip(numbers[::2], numbers[1::2], strict=True))
    return [[next(pieces) for _ in range(count)] for count in runs]


def _gather(x: Tensor, name: str, runs: list[int], numbers: list[int]) -> Tensor:
    places = [_index(pieces, x.device) for pieces in _read(runs, numbers)]
    padded = x.new_zeros(max(map(len, places)), *x.shape[1:])
    padded[: len(x)] = x
    every = wire.all_gather(padded, wire.group_named(name))
    whole = x.new_empty(sum(map(len, places)), *x.shape[1:])
    for found, at in zip(every, places, strict=True):
        whole[at] = found[: len(at)]
    return whole


def _fake(x: Tensor, name: str, runs: list[int], numbers: list[int]) -> Tensor:
    return x.new_empty(sum(numbers[1::2]), *x.shape[1:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, name, runs, numbers = inputs
    ctx.pieces = _read(runs, numbers)[wire.group_named(name).rank()]
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The own tokens': every rank has the whole loss."""
    return (grad[_index(ctx.pieces, grad.device)],)


LIBRARY.define(f"{OP}(Tensor x, str group, int[] runs, int[] pieces) -> Tensor")
for _key in ("CPU", "CUDA"):
    LIBRARY.impl(OP, _gather, _key)
torch.library.register_fake(f"{NAMESPACE}::{OP}", _fake)
# Once: the tokens of the other ranks, on which the own gradient depends, are constants here.
register_derivative(NAMESPACE, OP, _save, _backward, accepted=ONCE)


def _bounds(cu_seqlens: Tensor) -> list[int]:
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise wrong("cu_seqlens", described(cu_seqlens), "integers [S + 1], or the number of tokens")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or any(end < begin for begin, end in zip(bounds, bounds[1:], strict=False)):
        raise wrong("cu_seqlens", bounds, "0 first, and then no number below the one before")
    return bounds


def _pieces(layout: str, bounds: list[int], world: int) -> list[list[Piece]]:
    if layout == "contiguous":
        return [[part] for part in _cut(0, bounds[-1], world)]
    spans = [(bounds[0], bounds[-1])] if layout == "zigzag" else list(zip(bounds, bounds[1:], strict=False))
    cut = [_cut(begin, end, 2 * world) for begin, end in spans]
    return [
        [part for parts in cut for part in (parts[rank], parts[2 * world - 1 - rank]) if part[1]]
        for rank in range(world)
    ]


def _cut(begin: int, end: int, parts: int) -> list[Piece]:
    """Side by side, each of ceil(length / parts) tokens, the last ones of what is left."""
    size = -(-(end - begin) // parts)
    places = [min(begin + k * size, end) for k in range(parts + 1)]
    return [(first, last - first) for first, last in zip(places, places[1:], strict=False)]


def _check_partition(pieces: list[list[Piece]], tokens: int, world: int) -> None:
    if len(pieces) != world:
        raise wrong("layout", f"pieces of {len(pieces)} ranks", f"those of {world}, or one of {', '.join(LAYOUTS)}")
    at = 0
    for first, count in sorted(piece for runs in pieces for piece in runs if piece[1]):
        if first != at or count < 0:
            raise wrong("layout", f"a piece ({first}, {count}) after token {at - 1}", "every token on one rank")
        at += count
    if at != tokens:
        raise wrong("layout", f"pieces of {at} tokens", f"each of {tokens} on one rank")
