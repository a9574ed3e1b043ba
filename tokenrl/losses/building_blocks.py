"""The parts of an objective as differentiable ops of their own, for losses that are written by hand."""

from torch import Tensor

from ..batch.checks import check_constant, check_floats, check_name, check_number
from ..batch.layout import layout_of
from ..errors import wrong
from ..objectives.gates.bounded import Identity
from ..objectives.policy import Objective
from ..objectives.statistics import check_statistic
from ..ops import backends, dispatch
from ..ops.dispatch import PolicyLossInputs
from .aggregation import span_weights
from .regularizers import NO_REGULARIZERS

KINDS = {"sum": "prefix_sum", "mean": "prefix_mean", "min": "prefix_min"}
_IDENTITY = Objective("identity", "token", Identity(), "token-mean", "the aggregation alone")


def prefix_ratio(
    logp: Tensor,
    old_logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kind: str = "sum",
    flow: str = "local",
    backend: str | None = None,
) -> Tensor:
    """Log of the prefix importance ratio of each token, with x = logp - old_logp over the valid tokens of its sequence.

    Args:
        logp: fp32 or fp64 [B, T], or [N] with cu_seqlens; it alone gets a gradient.
        old_logp: of that shape, a constant.
        mask: bool of that shape; masked cells may hold anything, add nothing and are 0.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        kind: "sum" sum_{j <= t} x_j, "mean" the same over t, "min" sg[min_{j < t} x_j] + x_t (MinPRO).
        flow: "through" the true derivative; "local" derivative 1 with respect to the own logp (CTPO); "min" is always
            local.
        backend: as for policy_loss.

    Returns:
        Of logp's shape and dtype, in nats.

    Source: CTPO, arXiv 2605.07331 (authors' code); MinPRO, arXiv 2601.22718 (notes).
    """
    check_name("kind", kind, KINDS)
    statistic = KINDS[kind]
    check_statistic(statistic, flow)
    layout = layout_of(logp, mask=mask, cu_seqlens=cu_seqlens)
    check_floats("logp", logp)
    check_floats("old_logp", old_logp)
    if old_logp.requires_grad:
        raise wrong(
            "old_logp", "a tensor that requires grad", "a constant (old_logp.detach()); only logp gets a gradient"
        )
    chosen = backends.choose(backend, logp.device)
    flat, old = layout.flat_tokens("logp", logp), layout.flat_tokens("old_logp", old_logp, logp.dtype)
    return dispatch.statistic(chosen, layout, flat, old, None, statistic, flow).view(layout.shape)


def position_adaptive_clip(
    log_ratio: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps_low: float | Tensor,
    eps_high: float | Tensor,
    power: float | Tensor,
    backend: str | None = None,
) -> Tensor:
    """clip(x_t, -eps_low t^power, eps_high t^power), t the 1-based count of valid tokens. The gradient is 1 inside the
    band and 0 outside.

    Args:
        log_ratio: x, fp32 or fp64 [B, T], or [N] with cu_seqlens, in nats.
        mask: bool of that shape; masked cells may hold anything and are 0.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        eps_low: a number, or a constant of that shape.
        eps_high: likewise.
        power: likewise.
        backend: as for policy_loss.

    Source: CTPO, arXiv 2605.07331 (authors' code).
    """
    layout = layout_of(log_ratio, mask=mask, cu_seqlens=cu_seqlens, name="log_ratio")
    check_floats("log_ratio", log_ratio)
    bounds = {"eps_low": eps_low, "eps_high": eps_high, "power": power}
    for name, bound in bounds.items():
        if isinstance(bound, Tensor):
            if bound.requires_grad:
                raise wrong(name, "a tensor that requires grad", "a constant; bounds carry no gradient, detach it")
            bounds[name] = layout.flat_tokens(name, bound, log_ratio.dtype)
        else:
            check_number(name, bound)
    chosen = backends.choose(backend, log_ratio.device)
    flat = layout.flat_tokens("log_ratio", log_ratio)
    clipped = dispatch.position_adaptive_clip(chosen, layout, flat, **bounds)
    return clipped.view(layout.shape)


def group_aggregate(
    values: Tensor,
    aggregation: str,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    advantages: Tensor | None = None,
    advantages_per: str | None = None,
    group_ids: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """sum_t w_t values_t with the weights of tokenrl.aggregation_weights, without building them; 0-d. The gradient with
    respect to values is w.

    Args:
        values: fp32 or fp64 per-token losses [B, T], or [N] with cu_seqlens.
        aggregation: a mode of tokenrl.aggregation_weights.
        mask: bool of that shape; masked cells may hold anything.
        cu_seqlens: integers [S + 1], where the sequences of a packed batch begin and end.
        advantages: [B] (or [S]), or one per token, for "balanced".
        advantages_per: as for policy_loss.
        group_ids: integers [B] (or [S]), for "group-mean" and "balanced".
        normalizer: the global count that the mode divides by, a number or 0-d; None: the batch's own.
        backend: as for policy_loss.
    """
    layout = layout_of(values, mask=mask, cu_seqlens=cu_seqlens, name="values")
    check_floats("values", values)
    if advantages is not None:
        check_constant("advantages", advantages)
        advantages = layout.flat_tokens_or_sequences("advantages", advantages, values.dtype, advantages_per)
    chosen = backends.choose(backend, values.device)
    weights = span_weights(
        aggregation, layout, advantages=advantages, group_ids=group_ids, normalizer=normalizer, backend=chosen
    )
    flat = layout.flat_tokens("values", values)
    inputs = PolicyLossInputs(
        _IDENTITY,
        _IDENTITY.gate,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        aggregation,
        weights,
        NO_REGULARIZERS,
    )
    return dispatch.policy_loss(chosen, layout, flat, None, inputs)[0]
