"""All collectives: what leaves this process goes through here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

_sent: list[tuple[str, int]] | None = None


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """(kind, bytes that this rank hands in) of each collective inside."""
    global _sent
    before, _sent = _sent, []
    try:
        yield _sent
    finally:
        _sent = before


def _count(kind: str, x: Tensor) -> None:
    if _sent is not None:
        _sent.append((kind, x.numel() * x.element_size()))


def group_named(name: str) -> dist.ProcessGroup:
    """Ops take a group by its name, as a graph holds no objects."""
    return _resolve_process_group(name)  # type: ignore[arg-type]  # a NewType of str, of no public module


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """[W, ...] of x [...], alike on all ranks, when it is called; until then both are left alone."""
    _count("all_gather", x)
    found, x = x.new_empty(group.size(), *x.shape), x.contiguous()
    work = None
    if found.numel():  # a size that all ranks have
        gather = _renamed("all_gather_single", "all_gather_into_tensor")
        work = gather(found.view(-1), x.view(-1), group=group, async_op=True)

    def finish() -> Tensor:
        if work is not None:
            work.wait()
        return found

    return finish


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[W, ...] of x [...], alike on all ranks."""
    return start_all_gather(x, group)()


def all_gather_rows(own: Tensor, group: dist.ProcessGroup) -> tuple[list[int], Tensor]:
    """(of each rank how many rows, the rows of all), of this rank's [n, ...]; two exchanges."""
    sizes = all_gather(torch.tensor([len(own)], device=own.device), group).view(-1).tolist()
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own
    every = all_gather(padded, group)
    return sizes, torch.cat([some[:size] for some, size in zip(every, sizes, strict=True)])


def _renamed(name: str, deprecated: str) -> Callable[..., Any]:
    """torch 2.13 deprecates the name that 2.11 has."""
    return getattr(dist, name, None) or getattr(dist, deprecated)


def start_all_reduce(x: Tensor, group: dist.ProcessGroup) -> Callable[[], None]:
    """The sum over ranks, in x, contiguous, when it is called."""
    _count("all_reduce", x)
    work = dist.all_reduce(x, group=group, async_op=True) if x.numel() else None
    return lambda: None if work is None else work.wait()


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, in x."""
    start_all_reduce(x, group)()
    return x


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[...], this rank's of the W parts of the sum over ranks of x [W, ...]."""
    _count("reduce_scatter", x)
    found = x.new_empty(x.shape[1:])
    if found.numel():
        scatter = _renamed("reduce_scatter_single", "reduce_scatter_tensor")
        scatter(found.view(-1), x.contiguous().view(-1), group=group)
    return found


def all_gather_objects(x: Any, group: dist.ProcessGroup) -> list[Any]:
    """For errors alone: it pickles."""
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, x, group=group)
    return found


@torch.no_grad()
def checksum(x: Tensor) -> Tensor:
    """int64, 0-d, on x's device: of integers or bools and their places, without a sync."""
    flat = x.reshape(-1).long()
    places = torch.arange(flat.numel(), device=flat.device)
    return ((flat + 1) * (2 * places * 0x9E3779B1 + 1)).sum() + flat.numel()
