"""What the objective makes of log-probs and entropies inside op linear_policy_loss: the loss, its terms, and their
gradients, by the raw ops of a backend."""

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...objectives.gates import GATES
from ...objectives.gates.kl import estimates
from ..arguments import OpArguments
from ..kernel_ops import ObjectiveInputs, RowInputs
from ..reference import regularized
from .head import HeadInputs

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


class Evaluated(NamedTuple):
    """A loss; the metrics of its objective [12], its KL and entropy; its gradients by log-probs and entropies, [N]; and
    these themselves, [N]."""

    loss: Tensor
    metrics: tuple[Tensor, Tensor, Tensor]
    grad_logp: Tensor
    grad_entropy: Tensor | None
    logp: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class _Gradients(OpArguments):
    """wanted: of hidden, weight, bias. main_grad: only its dtype matters here. old_logp None: on-policy."""

    wanted: list[bool]
    main_grad: Tensor | None
    old_logp: Tensor | None


@dataclass(frozen=True)
class _Regularizers(OpArguments):
    """ref_logp None: no KL term. kl_*: the row that estimates it, a statistic of single tokens; kl_ratio: a statistic.
    *_weight [N]: the term's own weights; None: those of the objective."""

    ref_logp: Tensor | None
    kl_gate: str
    kl_params: list[float]
    kl_clamp: float
    kl_cap: float
    kl_coef: float
    kl_weight: Tensor | None
    kl_ratio: str | None
    entropy_coef: float
    entropy_weight: Tensor | None


@dataclass(frozen=True)
class LinearPolicyLossInputs(_Regularizers, RowInputs, _Gradients, HeadInputs):
    """Of op linear_policy_loss; its advantages are one per token, its mask is given, its ids are [N, 1]."""

    @property
    def active(self) -> Tensor:
        """bool [N]: the tokens that the mask leaves in."""
        assert self.mask is not None
        return self.mask

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's coefficient may depend on the log-probs of later tokens of its sequence."""
        local = self.statistic == "token" or (self.statistic.startswith("prefix") and self.flow == "local")
        return (not local and self.old_logp is not None) or self.kl_ratio not in (None, "token")

    def objective(self, logp: Tensor, old_logp: Tensor) -> ObjectiveInputs:
        """Of op objective, for as many tokens as there are log-probs."""
        count = logp.numel()
        cu_seqlens = self.cu_seqlens if count == self.ids.numel() else self.cu_seqlens.clamp(max=count)
        return ObjectiveInputs(
            logp, _first(old_logp, count), _first(self.advantages, count), _first(self.mask, count), cu_seqlens,
            _first(self.starts, count), self.span_weight, self.normalizer, _first(self.token_weight, count),
            self.statistic, self.flow, self.gate, self.params, [_first(p, count) for p in self.param_tensors],
            self.clamp, self.cap,
        )  # fmt: skip

    def evaluate(self, ops: Any, logp: Tensor, entropy: Tensor) -> "Evaluated":
        """The loss of the first tokens, whose log-probs and entropies these are."""
        inputs = self.objective(logp, logp if self.old_logp is None else self.old_logp)
        loss, coef, metrics = ops.objective(*inputs)
        kl, kl_grad = (None, None) if self.ref_logp is None else self._kl(ops, inputs, self.ref_logp[: logp.numel()])
        # sum_t w_t entropy_t, as k1 of the entropy to 0.
        term = replace(self._beside(inputs, self.entropy_weight), logp=entropy, old_logp=torch.zeros_like(entropy))
        term = replace(term, gate="kl_k1", params=[], param_tensors=[], clamp=math.inf, cap=math.inf)
        bonus, weights, _ = ops.objective(*term)
        loss = regularized(loss, kl, self.kl_coef, bonus, self.entropy_coef)
        grad_logp = regularized(coef, kl_grad, self.kl_coef, None, self.entropy_coef)
        grad_entropy = -self.entropy_coef * weights if self.entropy_coef != 0 else None
        sums = (metrics, torch.zeros_like(bonus) if kl is None else kl, bonus)
        return Evaluated(loss, sums, grad_logp, grad_entropy, logp, entropy)

    def _beside(self, inputs: ObjectiveInputs, weight: Tensor | None) -> ObjectiveInputs:
        """A term of single tokens: under weights of its own, or those of the objective."""
        term = replace(inputs, advantages=None, statistic="token", flow="through", starts=None)
        if weight is None:
            return term
        one = torch.ones_like(self.normalizer)
        weight = _first(weight, inputs.logp.numel())
        return replace(term, span_weight=torch.ones_like(self.span_weight), normalizer=one, token_weight=weight)

    def _kl(self, ops: Any, inputs: ObjectiveInputs, ref: Tensor) -> tuple[Tensor, Tensor]:
        """(the KL term, its gradient by log-probs); of r k that is r dk + k dr."""
        term = replace(self._beside(inputs, self.kl_weight), old_logp=ref, gate=self.kl_gate, params=self.kl_params)
        term = replace(term, param_tensors=[None] * len(self.kl_params), clamp=self.kl_clamp, cap=self.kl_cap)
        if self.kl_ratio is None:
            return ops.objective(*term)[:2]
        gate, where = GATES[self.kl_gate](*self.kl_params), (inputs.mask, inputs.cu_seqlens, inputs.starts)
        k = estimates(gate, inputs.logp, ref, _first(self.active, ref.numel()), self.kl_clamp, self.kl_cap)
        x = (inputs.logp - inputs.old_logp).clamp(-self.clamp, self.clamp)
        r = ops.statistic(x, torch.zeros_like(x), *where, self.kl_ratio, "through").exp()
        weighed = replace(term, token_weight=r if term.token_weight is None else r * term.token_weight)
        kl, through_kl, _ = ops.objective(*weighed)
        plain = replace(term, old_logp=inputs.old_logp, gate="ratio", params=[], param_tensors=[], clamp=self.clamp)
        plain = replace(plain, advantages=-k, statistic=self.kl_ratio, starts=inputs.starts, cap=math.inf)
        return kl, through_kl + ops.objective(*plain)[1]


def _first(x: MaybeTensor, count: int) -> MaybeTensor:
    return x if x is None or x.numel() == count else x[:count]
