"""What a policy loss is made of beside its objective: a KL penalty and an entropy bonus under the same weights, and the
correction of the rollout in these.

loss = sum_t w_t (gate(s_t) + kl_coef kl_t - entropy_coef entropy_t)
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, reference
from .corrections import importance_weights
from .errors import wrong
from .layout import Layout
from .objectives import Objective, kl_estimator
from .run import Batch, evaluate

TRUNCATED = {"level": "token", "bound": "truncate", "high": 2.0}  # verl's default


@dataclass(frozen=True)
class ExtraTerms:
    """kl: a row of the table; ref_logp None: no KL term."""

    ref_logp: Tensor | None
    kl: Objective
    kl_coef: float
    entropy_coef: float

    @property
    def wanted(self) -> bool:
        return self.entropy_coef != 0 or (self.ref_logp is not None and self.kl_coef != 0)


def extra_terms(
    layout: Layout, dtype: torch.dtype, ref_logp: Tensor | None, kl: str | Objective, kl_coef: float,
    entropy_coef: float,
) -> ExtraTerms:  # fmt: skip
    """The terms, checked and flat."""
    kl = kl_estimator(kl)
    if ref_logp is None and kl_coef != 0:
        raise wrong("ref_logp", None, f"one log-prob per token, {list(layout.shape)}; kl_coef is {kl_coef}")
    if ref_logp is not None:
        if ref_logp.requires_grad:
            raise wrong("ref_logp", "a tensor that requires grad", "a constant (ref_logp.detach())")
        ref_logp = layout.tokens("ref_logp", ref_logp, dtype)
    return ExtraTerms(ref_logp, kl, float(kl_coef), float(entropy_coef))


def total(
    chosen: backends.Backend, layout: Layout, logp: Tensor, entropy: Tensor | None, batch: Batch, extra: ExtraTerms
) -> tuple[Tensor, Tensor]:
    """(loss, raw metrics: those of the objective, then sum_t w_t kl_t and sum_t w_t entropy_t) of flat log-probs, by
    way of autograd."""
    loss, raw = evaluate(chosen, layout, logp, logp.detach() if batch.old_logp is None else batch.old_logp, batch)
    kl, bonus = torch.zeros_like(loss), torch.zeros_like(loss)
    if extra.ref_logp is not None:
        rows = dataclasses.replace(batch, row=extra.kl, gate=extra.kl.gate, form=None, advantages=None, starts=None)
        kl, _ = evaluate(chosen, layout, logp, extra.ref_logp, rows)
        loss = loss + extra.kl_coef * kl
    if entropy is not None:
        weights = token_weights(layout, batch, logp)
        bonus = torch.where(weights != 0, weights * entropy, 0).sum()
        loss = loss - extra.entropy_coef * bonus
    return loss, torch.cat([raw, torch.stack([kl, bonus]).detach()])


def token_weights(layout: Layout, batch: Batch, like: Tensor) -> Tensor:
    """w [N]."""
    weights = batch.weights
    return reference.token_weights(
        weights.span_weight, weights.normalizer, batch.token_weight, layout.cu_seqlens, layout.valid(), like
    )


def corrected(
    layout: Layout, logp: Tensor | None, rollout_logp: Tensor | None, segment_ids: Tensor | None,
    token_weight: Tensor | None, correction: dict | None,
) -> Tensor | None:  # fmt: skip
    """token_weight times the importance weights of logp to the rollout's, if that is given."""
    if rollout_logp is None:
        if correction is not None:
            raise wrong("rollout_logp", None, "log-probs of the sampling engine; correction is given")
        return token_weight
    if logp is None:
        raise wrong("old_logp", None, "log-probs to compare rollout_logp with; on-policy they are not known in advance")
    given = TRUNCATED if correction is None else correction
    if given.get("level") == "segment":
        given = {"segment_ids": segment_ids} | given
    if logp.shape != layout.shape:
        raise wrong("old_logp", f"shape {list(logp.shape)}", f"one value per token, {list(layout.shape)}")
    where = {"mask": None if layout.mask is None else layout.mask.view(layout.shape)}
    if layout.width is None:
        where["cu_seqlens"] = layout.cu_seqlens
    weights = importance_weights(logp.detach(), rollout_logp, **where, **given)
    return weights if token_weight is None else torch.where(weights != 0, weights * token_weight, 0)
