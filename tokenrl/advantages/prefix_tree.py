"""The prefix tree of the responses to a prompt, without gradient: TEMPO's advantages, TVM's labels of tokens."""

import torch
from torch import Tensor

from ..batch.checks import as_float64, as_rewards, check_integers, check_name, check_number
from ..batch.groups import SCALES, Groups, as_groups, statistics_of
from ..batch.valid_tokens import ValidTokens, valid_of

HOLES = ("stop", "skip")
ENDS = ("valid", "cells")
BLOCK = 512  # positions compared at a time at most: most pairs part in the first block
CELLS = 1 << 21  # cells compared at a time, which bounds the memory


def tempo(
    rewards: Tensor,
    group_ids: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    scale: str = "std",
    eps: float = 1e-6,
    unbiased: bool = True,
    singleton: str = "raw",
    holes: str = "stop",
    ends: str = "valid",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    unscored: str = "raise",
) -> Tensor:
    """TEMPO (P2T), A_t = (R - mean_g + V(S_t) - V(S_{t-1})) / (std_g + eps): [S] -> [B, T].

    S_t: the responses of the group whose tokens up to t are those of this one (S_{-1}: all of them), V(S) the mean of
    their rewards. So a token at which the tree does not branch has the advantage of grpo, and where it branches the
    change of the expected reward is added.

    Args:
        rewards: fp32 or fp64 [S], a constant.
        group_ids: integers [S]; the rows of a group must be in one call, as the tree is made of them.
        ids: integers [B, T], or [N] with cu_seqlens, the tokens of the responses, tool output included: what lies in a
            hole of the mask is part of the prefix and is compared.
        mask: bool of that shape.
        scale: as for grpo, "std" or "none".
        eps: as for grpo.
        unbiased: as for grpo.
        singleton: as for grpo.
        holes: "stop" (authors' code), tokens after the first masked cell of a row have the advantage of grpo; "skip"
            (our reading), they go on with the walk; a branch inside a hole was not the policy's, and its change of V is
            nobody's.
        ends: "valid" (our reading), a response ends with its last valid token, where it leaves those that go on; what
            masked cells after it hold does not matter. "cells" (authors' code), all cells of a row are compared, so
            that a response which ended shares a prefix with one that samples the id of the padding.
        mean: [S], as for grpo; V always is of the rewards of the call.
        std: [S], likewise.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        unscored: as for grpo.

    Source: arXiv 2509.18314 (authors' code).
    """
    for name, value, accepted in (("scale", scale, SCALES), ("holes", holes, HOLES), ("ends", ends, ENDS)):
        check_name(name, value, accepted)
    check_number("eps", eps, 0)
    check_integers("ids", ids)
    valid = valid_of(ids, mask, cu_seqlens, "ids")
    x = valid.layout.flat_sequences("rewards", as_rewards(rewards, unscored=unscored), torch.float64)
    groups = as_groups(group_ids, x, unscored)
    own = statistics_of(x, groups, unbiased, singleton)
    centred = x - (own.mean if mean is None else as_float64("mean", mean, x.shape, x))
    width = own.std if std is None else as_float64("std", std, x.shape, x)
    a = centred[valid.row] + _value_steps(x, groups, ids, valid, holes, ends)[valid.cells]
    return valid.put(a / (width + eps)[valid.row] if scale == "std" else a, rewards.dtype)


def prefix_values(
    rewards: Tensor,
    group_ids: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    unscored: str = "raise",
) -> Tensor:
    """V(S_t), the mean reward of the responses of the group whose tokens up to t are those of this one: [S] -> [B, T],
    0 in masked cells, in the dtype of the rewards. Of rewards 0 and 1 the share of right answers among the rollouts
    that go on from this prefix; where no other shares it, the own reward. Labels for value_loss.

    Args:
        rewards: fp32 or fp64 [S], a constant.
        group_ids: integers [S]; the rows of a group must be in one call.
        ids: integers [B, T], or [N] with cu_seqlens, as for tempo with holes "skip" and ends "valid".
        mask: bool of that shape.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        unscored: as for grpo.

    Source: TVM, arXiv 2407.12863 (abstract and figures; holes are our reading).
    """
    check_integers("ids", ids)
    valid = valid_of(ids, mask, cu_seqlens, "ids")
    layout = valid.layout
    x = layout.flat_sequences("rewards", as_rewards(rewards, unscored=unscored), torch.float64)
    groups = as_groups(group_ids, x, unscored)
    values, last = x.new_zeros(layout.num_tokens), torch.full((layout.num_tokens,), -1, device=x.device)
    if last.numel() > 0:
        cells, _, after = _walk(x, groups, ids, valid, "skip", "valid")
        values[cells], last[cells] = after, cells
        last = last.cummax(0).values
        branched = last >= layout.spread(layout.cu_seqlens[:-1])
        lowest = layout.spread(-groups.max(-x))
        everyone = layout.spread(groups.mean(x, torch.ones_like(x)))
        values = torch.where(branched, lowest + values[last.clamp(min=0)], everyone)
    return valid.put(values[valid.cells], rewards.dtype)


def _value_steps(x: Tensor, groups: Groups, ids: Tensor, valid: ValidTokens, holes: str, ends: str) -> Tensor:
    """float64 [N]: V(S_t) - V(S_{t-1}) where the walk of the row passes, 0 elsewhere."""
    steps = x.new_zeros(valid.layout.num_tokens)
    if steps.numel() > 0:
        cells, before, after = _walk(x, groups, ids, valid, holes, ends)
        steps[cells] = after - before
    return steps


def _walk(
    x: Tensor, groups: Groups, ids: Tensor, valid: ValidTokens, holes: str, ends: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(cells at which the tree branches, V before each and after it, less the lowest reward of the group)."""
    start, length = valid.layout.cu_seqlens[:-1], _lengths(valid, ends)
    limit = _first_masked(valid) if holes == "stop" else length
    order = groups.index.argsort(stable=True)
    start, length, limit, group = start[order], length[order], limit[order], groups.index[order]
    sizes = torch.bincount(group, minlength=groups.number)
    first = (sizes.cumsum(0) - sizes)[group]
    members = first[:, None] + torch.arange(int(sizes.max()), device=x.device)
    present = members < (first + sizes[group])[:, None]
    leaves = _leaves(ids.reshape(-1), start, length, group, torch.where(present, members, -1))
    # Around the minimum of the group, so that equal rewards have differences of exactly 0.
    above = torch.where(present, (x + groups.max(-x))[order][members.clamp(max=x.numel() - 1)], 0.0)
    leaves, before, after = _values_by_leaving(leaves, above, present)
    passed = leaves < limit[:, None]
    return (start[:, None] + leaves)[passed], before[passed], after[passed]


def _lengths(valid: ValidTokens, ends: str) -> Tensor:
    """int64 [S]: the cells of a row that are compared."""
    boundaries = valid.layout.cu_seqlens
    if ends == "cells":
        return boundaries.diff()
    past = torch.searchsorted(valid.cells, boundaries)
    last = torch.cat([valid.cells.new_full((1,), -1), valid.cells])[past[1:]]
    return torch.where(past.diff() > 0, last + 1 - boundaries[:-1], 0)


def _first_masked(valid: ValidTokens) -> Tensor:
    """int64 [S]: the position of a row's first masked cell, the row's length if there is none."""
    boundaries = valid.layout.cu_seqlens
    masked = valid.layout.valid().logical_not().nonzero()[:, 0]
    first = torch.cat([masked, boundaries[-1:]])[torch.searchsorted(masked, boundaries[:-1])]
    return torch.minimum(first, boundaries[1:]) - boundaries[:-1]


def _leaves(ids: Tensor, start: Tensor, length: Tensor, group: Tensor, members: Tensor) -> Tensor:
    """int64 [S, G]: the position at which each member of a row's group leaves the row; the number of all tokens for the
    row itself and for members of -1.

    A class is a set of rows that share their first cells. In a round all its rows are compared with one of them only,
    its leader: two that leave that row at different positions leave each other at the earlier one, and two that leave
    it at the same position with different ids do so there. Those with the same id are a class of the next round. The
    leader is drawn, so that a row's class is halved on average: the first row would cost a chain a round per row.
    """
    never, rows = ids.numel(), torch.arange(start.numel(), device=ids.device)
    leaves, left = torch.full_like(members, never), torch.full_like(start, never)
    kind, shared = group.clone(), torch.zeros_like(start)
    alive = rows[(members >= 0).sum(1) > 1]
    draw = torch.randperm(rows.numel(), generator=torch.Generator().manual_seed(0), device="cpu").to(rows.device)
    drawn = draw.argsort()
    block = min(max(int(length.max()), 1), BLOCK)
    blocks = torch.nn.functional.pad(ids, (0, block)).unfold(0, block, 1)
    while alive.numel():
        _, index = kind[alive].unique(return_inverse=True)
        leader = drawn[torch.full_like(rows, rows.numel()).scatter_reduce_(0, index, draw[alive], "amin")[index]]
        led = leader != alive
        left[leader] = never
        left[alive[led]] = _common(blocks, start, length, shared, alive[led], leader[led])
        others = members[alive]
        met = (others >= 0) & (kind[others] == kind[alive, None]) & (others != alive[:, None])
        leaves[alive] = torch.where(met, torch.minimum(left[others], left[alive, None]), leaves[alive])
        on = left[alive] < length[alive]
        going, at = alive[on], left[alive[on]]
        # Three times unique and not once with dim=0, which walks its rows one by one.
        _, ids_met = ids[start[going] + at].unique(return_inverse=True)
        _, index = (kind[going] * (never + 1) + at).unique(return_inverse=True)
        _, index, counts = (index * (rows.numel() + 1) + ids_met).unique(return_inverse=True, return_counts=True)
        company = counts[index] > 1
        # Whoever is done is in no class that a later round numbers.
        kind[alive] = -1 - alive
        alive = going[company]
        kind[alive], shared[alive] = index[company], at[company]
    return leaves


def _common(blocks: Tensor, start: Tensor, length: Tensor, shared: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """int64 [P]: how many cells the rows left and right of a pair share from their start; the first shared[left] are
    known to be. blocks: [N + 1, block], the ids from each cell on."""
    block = blocks.shape[1]
    common, done = torch.minimum(length[left], length[right]), shared[left]
    together = (common > done).nonzero()[:, 0]
    while together.numel():
        still = []
        for pairs in together.split(CELLS // block):
            at = done[pairs]
            differ = blocks[start[left[pairs]] + at] != blocks[start[right[pairs]] + at]
            parted = differ.any(1)
            # A difference may lie past the end of a row, in what is not its own.
            found = at[parted] + differ[parted].view(torch.uint8).argmax(1)
            common[pairs[parted]] = torch.minimum(common[pairs[parted]], found)
            still.append(pairs[~parted])
        together = torch.cat(still)
        done[together] += block
        together = together[common[together] > done[together]]
    return common


def _values_by_leaving(leaves: Tensor, above: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(leaves in order [S, G], V before and after each): those that leave at or after a position are the set before it,
    those that leave later the set after it."""
    leaves, by = leaves.sort(1)
    total = above.gather(1, by).flip(1).cumsum(1).flip(1)
    value = total / present.double().gather(1, by).flip(1).cumsum(1).flip(1).clamp(min=1)
    before = torch.searchsorted(leaves, leaves)
    after = torch.searchsorted(leaves, leaves, right=True).clamp(max=leaves.shape[1] - 1)
    return leaves, value.gather(1, before), value.gather(1, after)
