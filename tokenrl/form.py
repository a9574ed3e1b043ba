"""The base of forms: what an objective does around its row where tokens meet in other ways than through a statistic.

A row of the table is s = S x, loss = sum_t w_t gate(s_t). A form changes what goes in: other log ratios x, computed in
differentiable torch, or factors of the weights w, which are constants. It sees the batch flat, as Tokens, and runs the
row on the call's backend as often as it needs. From hidden states a form takes two passes over the logits, since its
coefficients wait for all log-probs.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from . import reference
from .gate import Gate, parametrised
from .layout import Layout
from .metrics import RAW
from .spread import spread


@parametrised
class Form:
    """Base of all forms. names: its parameters, set by tokenrl.objective(name, ...) like those of a gate."""

    names: ClassVar[tuple[str, ...]]

    def evaluate(self, tokens: "Tokens") -> tuple[Tensor, Tensor]:
        """(loss, raw metrics)."""
        raise TypeError(f"{type(self).__name__} is no form: it defines no evaluate")


class Tokens:
    """The tokens of a call, flat [N]; logp carries the gradient. batch: see tokenrl/run.py.

    valid: bool. x: the log ratios, clamped as the row's; 0 in masked cells; differentiable. advantages: one per token.
    """

    def __init__(self, run_row, chosen, layout: Layout, batch, logp: Tensor, old_logp: Tensor):
        self.run_row, self.chosen, self.layout, self.batch = run_row, chosen, layout, batch
        self.logp, self.old_logp, self.valid = logp, old_logp, layout.valid()
        clamp = batch.row.clamp
        self.x = torch.where(self.valid, logp - old_logp, 0).clamp(-clamp, clamp)
        self.advantages = reference.per_token(batch.advantages, layout.cu_seqlens, self.valid, logp.detach())

    def run(
        self, *, log_ratio: Tensor | None = None, factor: Tensor | None = None, gate: Gate | None = None
    ) -> tuple[Tensor, Tensor]:
        """(loss, raw metrics) of the row. log_ratio: in place of logp - old_logp, for gates that read s alone; factor:
        multiplies the weights; gate: in place of the row's."""
        batch = self.batch
        if factor is not None:
            weight = factor
            if batch.token_weight is not None:  # a factor of 0 hides even an infinite weight
                weight = torch.where(factor != 0, factor * batch.token_weight, 0)
            batch = dataclasses.replace(batch, token_weight=weight)
        if gate is not None:
            batch = dataclasses.replace(batch, gate=gate)
        if log_ratio is None:
            return self.run_row(self.chosen, self.layout, self.logp, self.old_logp, batch)
        loss, raw = self.run_row(self.chosen, self.layout, log_ratio, torch.zeros_like(log_ratio), batch)
        x = self.x.detach()
        return loss, self._with(raw, kl_sum=(torch.expm1(x) - x).sum())  # of the token's own ratio

    def spread(self, x: Tensor, statistic: str) -> Tensor:
        """A statistic of x over each token's span, differentiable; x is 0 in masked cells."""
        zero = torch.zeros_like(x)
        return spread(self.chosen, self.layout, x, zero, self.batch.starts, statistic, "through")

    def lengths(self) -> Tensor:
        """The number of valid tokens of each token's span, at least 1."""
        return self.spread(self.valid.to(self.logp.dtype), "span_sum").clamp(min=1)

    def positions(self) -> Tensor:
        """The 1-based count of valid tokens in each token's span."""
        return self.spread(self.valid.to(self.logp.dtype), "prefix_sum")

    def span(self) -> Tensor:
        """int64 [N]: a number for each token's span, rising from one to the next."""
        first = torch.zeros(self.valid.numel() + 1, dtype=torch.int64, device=self.valid.device)
        first[self.layout.cu_seqlens] = 1
        first = first[:-1] if self.batch.starts is None else first[:-1] | self.batch.starts.long()
        return first.cumsum(0) - 1

    def counted(self, raw: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The metrics with other counts of tokens below and above a bound."""
        return self._with(raw, clip_low=(low & self.valid).sum(), clip_high=(high & self.valid).sum())

    def _with(self, raw: Tensor, **entries: Tensor) -> Tensor:
        raw = raw.clone()
        for name, value in entries.items():
            raw[RAW.index(name)] = value
        return raw
