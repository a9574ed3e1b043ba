"""clip_cov and kl_cov, whose selection is of the whole batch, on a batch that is split over ranks and micro-batches."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import wire
from ..batch.layout import layout_of
from ..errors import described, wrong
from ..objectives.forms.base import FormInputs
from ..objectives.forms.weights import ClipCov, KlCov
from ..objectives.policy import Objective, find_objective, objective
from ..ops import dispatch
from ..ops.backends import BACKENDS
from .agreement import Agreement
from .vocab_shard import as_group

Parts = Sequence[Tensor]


def covariance_selection(
    row: str | Objective,
    logp: Parts,
    old_logp: Parts | None,
    advantages: Parts,
    masks: Parts | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh,
    cu_seqlens: Parts | None = None,
    check: bool = True,
) -> Objective:
    """The row with the numbers of the whole batch, so that the parts select together what the whole would:

        kl_cov     mean_advantages, mean_logp, threshold: the k-th highest covariance, k = max(fraction N, 1)
        clip_cov   mean_advantages, mean_logp, rate: the share of its candidates, min(max(fraction N, 1) / M, 1)

        row = covariance_selection("kl_cov", logp, old_logp, advantages, masks, group=dp_group)
        loss, metrics = policy_loss(row, logp[i], old_logp[i], advantages[i], mask=masks[i], ...)

    kl_cov selects the tokens of one process, unless covariances tie at the threshold: then all that do. clip_cov drops
    each of its candidates by a draw of its own, as many as the whole in the mean. Two exchanges: of three numbers, and
    of one, or of k.

    Args:
        row: "clip_cov", "kl_cov", or one of them with other parameters.
        logp: of this rank's micro-batches, log-probs of the current policy, or, before these are known, the old ones.
        old_logp: of each, as for policy_loss; None: on-policy.
        advantages: of each, as for policy_loss.
        masks: of each, as for policy_loss.
        group: the data-parallel ranks.
        cu_seqlens: of each, as for policy_loss.
        check: that the ranks agree on the row, by one exchange of 256 bytes before.

    Source: our reading of arXiv 2505.22617 over a split batch.
    """
    group = as_group(group)
    if not isinstance(logp, Sequence) or not logp:
        raise wrong("logp", described(logp), "those of the micro-batches, one at least")
    with Agreement("covariance_selection", group, logp[0].device, check) as agreed:
        row = find_objective(row)
        if not isinstance(row.form, ClipCov | KlCov):
            raise wrong("row", repr(row.name), "'clip_cov' or 'kl_cov'")
        parts = {"old_logp": old_logp, "advantages": advantages, "masks": masks, "cu_seqlens": cu_seqlens}
        for name, some in parts.items():
            if some is not None and (not isinstance(some, Sequence) or len(some) != len(logp)):
                raise wrong(name, described(some), f"one for each of the {len(logp)} micro-batches")
        tokens = [_tokens(row, k, logp, old_logp, advantages, masks, cu_seqlens) for k in range(len(logp))]
        agreed.same(row=row.name, form=row.form, dtype=logp[0].dtype)
    sums = torch.stack([_sums(x) for x in tokens]).sum(0)
    count, of_advantages, of_logp = wire.all_gather(sums, group).sum(0).tolist()
    means = {"mean_advantages": of_advantages / max(count, 1), "mean_logp": of_logp / max(count, 1)}
    row = objective(row, **means)
    budget = max(int(row.form.fraction * int(count)), 1)  # type: ignore[union-attr]  # as the form's own
    if isinstance(row.form, ClipCov):
        inside = torch.stack([row.form.candidates(x)[0].sum() for x in tokens]).sum()
        candidates = int(wire.all_gather(inside, group).sum())
        return objective(row, rate=min(budget / max(candidates, 1), 1.0))
    assert isinstance(row.form, KlCov)
    return objective(row, threshold=_kth(row.form, tokens, budget, group))


def _kth(form: KlCov, tokens: list[FormInputs], k: int, group: dist.ProcessGroup) -> float:
    """The k-th highest covariance of all ranks."""
    own = torch.cat([form.covariance(x)[x.valid] for x in tokens])
    best = own.new_full((k,), -torch.inf)
    found = own.topk(min(k, len(own))).values
    best[: len(found)] = found
    return float(wire.all_gather(best, group).view(-1).topk(k).values[-1])


def _sums(tokens: FormInputs) -> Tensor:
    """fp64: how many there are, the sums of their advantages and log-probs."""
    some = [tokens.valid, tokens.advantages, torch.where(tokens.valid, tokens.logp, 0)]
    return torch.stack([x.sum(dtype=torch.float64) for x in some])


def _tokens(
    row: Objective, k: int, logp: Parts, old_logp: Parts | None, advantages: Parts, masks: Parts | None,
    cu_seqlens: Parts | None,
) -> FormInputs:  # fmt: skip
    """What the form is given of a micro-batch, without a row to run."""
    layout = layout_of(
        logp[k], mask=None if masks is None else masks[k], cu_seqlens=None if cu_seqlens is None else cu_seqlens[k]
    )
    flat = layout.flat_tokens("logp", logp[k].detach())
    old = flat if old_logp is None else layout.flat_tokens("old_logp", old_logp[k], flat.dtype)
    valid = layout.valid()
    x = torch.where(valid, flat - old, 0).clamp(-row.clamp, row.clamp)
    given = layout.flat_tokens_or_sequences("advantages", advantages[k], flat.dtype)

    def statistic_of(x: Tensor, name: str) -> Tensor:
        return dispatch.statistic(BACKENDS["reference"], layout, x, torch.zeros_like(x), None, name, "through")

    def run_row(*_: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("a selection runs no row")

    return FormInputs(
        layout, flat, old, valid, x, layout.per_token(given, flat), None, None, None, None, row.aggregation,
        flat.new_ones(()), row.gate, run_row, statistic_of,
    )  # fmt: skip
