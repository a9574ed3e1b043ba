"""Statistics of a batch that is split over data-parallel ranks: counts, moments, groups, and whole estimators."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import wire
from ..batch.checks import check_floats, check_integers, check_positive, check_tensor
from ..batch.groups import GroupStatistics
from ..batch.groups import group_statistics as statistics_of_rows
from ..errors import described, wrong
from .agreement import Agreement
from .vocab_shard import as_group

Group = dist.ProcessGroup | DeviceMesh
Count = int | float | Tensor


def global_count(
    counts: Count | Sequence[Count], *, group: Group, averaged_over: float = 1, device: torch.device | str | None = None
) -> Tensor:
    """What the losses of the parts of a batch are divided by, as their normalizer, so that they add up to its own:

        sum of the counts over the ranks' micro-batches / averaged_over,   at least 1 / averaged_over

    preference_loss(normalizer=) takes that of pairs, nll_normalizer= that of tokens. One exchange of 8 bytes.

    Args:
        counts: of this rank's micro-batches, or one: numbers, or tensors, whose elements are added up.
        group: the data-parallel ranks.
        averaged_over: as for global_weights.
        device: of the exchange; None: that of the first tensor, else the CPU.

    Returns:
        fp64, 0-d.
    """
    check_positive("averaged_over", averaged_over)
    every: list[Any] = list(counts) if isinstance(counts, list | tuple) else [counts]
    given = next((x.device for x in every if isinstance(x, Tensor)), "cpu") if device is None else device
    parts = [x.sum().to(given, torch.float64) if isinstance(x, Tensor) else float(x) for x in every]
    own = torch.zeros((), dtype=torch.float64, device=given) + sum(parts)
    return wire.all_gather(own, as_group(group)).sum().clamp(min=1) / averaged_over


class Moments(NamedTuple):
    """fp64, 0-d: of all valid values; the variance over n - 1, or n if not unbiased."""

    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # hides the count of a tuple


def moments(
    values: Tensor, mask: Tensor | None = None, *, group: Group, unbiased: bool = True, check: bool = True
) -> Moments:
    """Mean and variance of the values of all ranks, for advantages.whiten(mean=, var=), after gae(whiten=False) for
    one, and std= of advantages.grpo(scale="batch"):

        n = sum_r n_r,  mean = sum_r n_r mean_r / n,  M2 = sum_r (M2_r + n_r (mean_r - mean)^2)

    The same bits on all ranks; one exchange of 24 bytes.

    Args:
        values: floats of any shape, of all the rank's micro-batches; without a value in a masked cell.
        mask: bool, of the shape of values.
        group: the data-parallel ranks.
        unbiased: divides by n - 1.
        check: that ranks agree on unbiased, by one exchange of 256 bytes before.
    """
    group = as_group(group)
    with Agreement("moments", group, values.device, check) as agreed:
        check_floats("values", values)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != values.shape):
            raise wrong("mask", described(mask), f"bool {list(values.shape)}, as values")
        agreed.same(unbiased=unbiased)
    x = (values if mask is None else values[mask]).detach().double().reshape(-1)
    count = x.new_full((), x.numel())
    mean = x.sum() / count.clamp(min=1)
    every = wire.all_gather(torch.stack([count, mean, (x - mean).square().sum()]), group)
    counts, means, squares = every.unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    total = (squares + counts * (means - mean).square()).sum()
    return Moments(mean, total / (count - int(unbiased)).clamp(min=1), count)


def group_statistics(
    rewards: Tensor, group_ids: Tensor, *, group: Group, unbiased: bool = True, singleton: str = "raw",
    unscored: str = "raise", check: bool = True,
) -> GroupStatistics:  # fmt: skip
    """advantages.group_statistics of groups whose sequences lie on several ranks: mean, std and count of each of this
    rank's sequences, for mean=, std=, count= of grpo, rloo and gpg. 16 bytes a sequence, the bits of one process.

    Args:
        rewards: this rank's, [S]; ranks may have different numbers of them.
        group_ids: integers [S], which mean the same on all ranks.
        group: the data-parallel ranks.
        unbiased: as for advantages.group_statistics.
        singleton: as for advantages.group_statistics.
        unscored: as for advantages.group_statistics.
        check: that ranks agree on these, by one exchange of 256 bytes before.
    """
    how: dict[str, Any] = {"unbiased": unbiased, "singleton": singleton, "unscored": unscored}
    first, own, whole = _of_all("group_statistics", (rewards, group_ids), group, check, how)
    found = statistics_of_rows(*whole, **how)
    return GroupStatistics(*(x[first : first + own] for x in found))


def advantages_over(
    estimator: Callable[..., Tensor], *per_sequence: Tensor, group: Group, named: Mapping[str, Tensor] | None = None,
    check: bool = True, **options: Any,
) -> Tensor:  # fmt: skip
    """An estimator of tokenrl.advantages over the sequences of all ranks: what its groups, scales and counts see is the
    whole batch; this rank's rows of the result, the bits of one process.

        A = advantages_over(advantages.gdpo, rewards, group_ids, group=dp_group, named={"lengths": lengths})

    Every rank gathers all arguments, 8 bytes a number, and runs it.

    Args:
        estimator: any that takes and gives one row a sequence.
        per_sequence: its first arguments, [S, ...] of this rank's sequences: rewards, group_ids, ...
        group: the data-parallel ranks.
        named: those of its arguments by name that are per sequence, too.
        check: that ranks agree on what they hand in, by one exchange of 256 bytes before.
        options: its other arguments, the same on all ranks.
    """
    named = {} if named is None else dict(named)
    tensors = (*per_sequence, *named.values())
    said = {"estimator": getattr(estimator, "__name__", estimator), "named": [*named], "options": sorted(options)}
    first, own, whole = _of_all("advantages_over", tensors, group, check, said)
    count = len(per_sequence)
    found = estimator(*whole[:count], **dict(zip(named, whole[count:], strict=True)), **options)
    return found[first : first + own]


def _of_all(
    what: str, tensors: Sequence[Tensor], group: Group, check: bool, said: Mapping[str, Any]
) -> tuple[int, int, list[Tensor]]:
    """(where this rank's rows begin, how many they are, the tensors of all ranks)."""
    group = as_group(group)
    device = tensors[0].device if tensors and isinstance(tensors[0], Tensor) else torch.device("cpu")
    with Agreement(what, group, device, check) as agreed:
        for x in tensors:
            check_tensor("per_sequence", x)
            if x.dim() == 0 or len(x) != len(tensors[0]):
                raise wrong("per_sequence", described(x), f"one row for each of the {len(tensors[0])} sequences")
        if not tensors:
            raise wrong("per_sequence", "none", "the rewards at least")
        if what == "group_statistics":
            check_integers("group_ids", tensors[1])
        agreed.same(shapes=[(x.dtype, list(x.shape[1:])) for x in tensors], **said)
    packed = [_as_int64(x.detach()).reshape(len(x), x.shape[1:].numel()) for x in tensors]
    widths = [x.shape[1] for x in packed]
    sizes, rows = wire.all_gather_rows(torch.cat(packed, 1), group)
    columns = zip(tensors, rows.split(widths, 1), strict=True)
    whole = [_as_given(found, x).reshape(-1, *x.shape[1:]) for x, found in columns]
    return sum(sizes[: group.rank()]), len(tensors[0]), whole


def _as_int64(x: Tensor) -> Tensor:
    return x.double().view(torch.int64) if x.is_floating_point() else x.long()


def _as_given(x: Tensor, like: Tensor) -> Tensor:
    x = x.contiguous()
    return (x.view(torch.float64) if like.is_floating_point() else x).to(like.dtype)
