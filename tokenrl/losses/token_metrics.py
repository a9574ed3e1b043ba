"""token_metrics: what the metrics of policy_loss count, token by token and sequence by sequence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch.checks import check_floats
from ..batch.layout import Layout, layout_of
from ..batch.spans import spans_of
from ..errors import wrong
from ..objectives.metrics import EXTREMES, NOTHING, RAW, of_tokens
from ..objectives.policy import Objective, find_objective
from ..ops import backends, dispatch
from .policy_arguments import policy_loss_inputs
from .regularizers import NO_REGULARIZERS


@dataclass(frozen=True, eq=False)
class TokenMetrics:
    """Of each token, of logp's shape, without gradient, 0 and False in masked cells.

    ratio: the objective's own e^s. log_ratio: the token's own x. clip_low, clip_high, clip_dual: bool, whether that
    bound is active. approx_kl: e^x - 1 - x.
    """

    ratio: Tensor
    log_ratio: Tensor
    clip_low: Tensor
    clip_high: Tensor
    clip_dual: Tensor
    approx_kl: Tensor
    entries: dict[str, Tensor]  # what each token adds to metrics.raw, [N]
    layout: Layout

    def sequence_sums(self) -> Tensor:
        """float64 [S, 12], columns named by tokenrl.Metrics.RAW: the `raw` of the metrics of each sequence alone, so
        that Metrics.merged of Metrics(row) of all rows is that of the batch."""
        spans = spans_of("sequence", self.layout)

        def of_sequences(name: str, nothing: float) -> Tensor:
            entry = self.entries[name].double()
            if name not in EXTREMES:
                return spans.sum(entry)
            return entry.new_full((spans.number,), nothing).scatter_reduce_(0, spans.index, entry, EXTREMES[name])

        return torch.stack([of_sequences(*pair) for pair in zip(RAW, NOTHING, strict=True)], 1)


def token_metrics(
    objective: str | Objective,
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor | None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages_per: str | None = None,
    segment_ids: Tensor | None = None,
    backend: str | None = None,
) -> TokenMetrics:
    """The metrics of policy_loss before they are summed up.

    Args:
        objective: a name in tokenrl.OBJECTIVES, or what tokenrl.objective(name, ...) returns; without a form.
        logp: fp32 or fp64 [B, T], or packed [N] with cu_seqlens; it may require a gradient, which ends here.
        old_logp: of that shape; None means on-policy. For "vespo" with rollout_logp, whose importance weights w are
            factors of its ratio, old_logp is old_logp - log w.
        advantages: [B] (or [S]), or one per token; None for objectives that use none.
        mask: bool of that shape; masked cells may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages_per: as for policy_loss.
        segment_ids: as for policy_loss.
        backend: runs the statistic; the bounds are the gate's in torch.

    Raises:
        ValueError: for an objective with a form, whose tokens meet in other ways than through a statistic; and as
            policy_loss.
    """
    row, layout = find_objective(objective), layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    if row.form is not None:
        raise wrong(
            "objective", f"{row.name!r}, which has a form", "an objective without one; its metrics are a batch's"
        )
    check_floats("logp", logp)
    chosen = backends.choose(backend, logp.device)
    inputs = policy_loss_inputs(
        row, layout, logp.dtype, chosen, old_logp=old_logp, advantages=advantages, advantages_per=advantages_per,
        token_weight=None, segment_ids=segment_ids, group_ids=None, aggregation="token-sum", normalizer=None,
        regularizers=NO_REGULARIZERS,
    )  # fmt: skip
    own, valid = layout.flat_tokens("logp", logp.detach()), layout.valid()
    old = own if inputs.old_logp is None else inputs.old_logp
    x = torch.where(valid, own - old, 0).clamp(-row.clamp, row.clamp)

    def statistic(of: Tensor, name: str, flow: str) -> Tensor:
        return dispatch.statistic(chosen, layout, of, torch.zeros_like(of), inputs.starts, name, flow)

    s, t = statistic(x, row.statistic, row.flow).clamp(max=row.cap), statistic(valid.to(x), "prefix_sum", "through")
    entries = of_tokens(inputs.gate, s, x, own, layout.per_token(inputs.advantages, x), t, valid)
    shown = {"ratio": entries["ratio_sum"].to(x.dtype), "log_ratio": x, "approx_kl": entries["kl_sum"].to(x.dtype)}
    shown |= {name: entries[name] for name in ("clip_low", "clip_high", "clip_dual")}
    return TokenMetrics(**{name: y.view(layout.shape) for name, y in shown.items()}, entries=entries, layout=layout)
