"""Pairs of sequences, of which one is preferred."""

import torch
from torch import Tensor

from ..errors import wrong
from .checks import as_saved, check_integers, values_known
from .layout import Layout


def checked_pairs(pairs: Tensor | None, layout: Layout) -> Tensor | None:
    """int64 [P, 2], of each the chosen and the rejected sequence, from integers. None: halves, sequence i of the first
    half is chosen and meets sequence i of the second."""
    number, device = layout.num_sequences, layout.cu_seqlens.device
    if pairs is None:
        if number % 2:
            raise wrong("pairs", None, f"integers [P, 2]; {number} sequences have no halves")
        return None
    check_integers("pairs", pairs)
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.device != device:
        raise wrong("pairs", f"shape {list(pairs.shape)} on {pairs.device}", f"integers [P, 2] on {device}")
    if values_known(pairs) and ((pairs < 0) | (pairs >= number)).any():
        raise wrong("pairs", f"{pairs.min()} to {pairs.max()}", f"numbers of sequences, 0 to {number - 1}")
    return as_saved(pairs).long().contiguous()


def sides_of(pairs: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """int64 [P] each: the chosen and the rejected sequence of each pair, of what checked_pairs returns."""
    if pairs is None:
        everyone = torch.arange(layout.num_sequences, device=layout.cu_seqlens.device)
        return everyone[: len(everyone) // 2], everyone[len(everyone) // 2 :]
    chosen, rejected = pairs.unbind(1)
    return chosen, rejected


def as_pairs(pairs: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """The same, of an argument."""
    return sides_of(checked_pairs(pairs, layout), layout)


def sides(pairs: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
    """int64 [S]: 1 of chosen sequences, -1 of rejected ones, 0 of those in no pair."""
    found = torch.zeros(layout.num_sequences, dtype=torch.int64, device=layout.cu_seqlens.device)
    return found.index_fill(0, pairs[1], -1).index_fill(0, pairs[0], 1)


def connected(pairs: tuple[Tensor, Tensor], number: int) -> list[int]:
    """For each of so many sequences the same number where pairs lead from one to the other. A sync on a GPU."""
    parent = list(range(number))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for chosen, rejected in zip(*(side.tolist() for side in pairs), strict=True):
        parent[root(rejected)] = root(chosen)
    return [root(i) for i in range(number)]
