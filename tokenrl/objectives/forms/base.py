"""The base of forms: what an objective does around its row where tokens meet in other ways than through a statistic.

A row of the table is s = S x, loss = sum_t w_t gate(s_t). A form changes what goes in: other log ratios x, computed in
differentiable torch, or factors of the weights w, which are constants. It sees the batch flat, as FormInputs, and runs
the row on the call's backend as often as it needs. From hidden states its coefficients wait for all log-probs: logits
that do not fit into the budget take a second pass, unless the head is frozen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...batch.layout import Layout
from ..excess import excess
from ..gates.base import Gate, Range, parametrised
from ..metrics import RAW


@parametrised
class Form:
    """Base of all forms. names: its parameters, set by tokenrl.objective(name, ...) like those of a gate.

    replaces_ratio: it runs the row with a log_ratio of its own."""

    names: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]
    ranges: ClassVar[Mapping[str, Range]]
    __dataclass_fields__: ClassVar[dict[str, Any]]
    replaces_ratio: ClassVar[bool] = False

    def evaluate(self, tokens: "FormInputs") -> tuple[Tensor, Tensor]:
        """(loss, raw metrics)."""
        raise TypeError(f"{type(self).__name__} is no form: it defines no evaluate")


@dataclass(frozen=True)
class FormInputs:
    """The tokens of a call, flat [N]; logp carries the gradient. What a form may run comes with them, as a call's
    backend computes it.

    valid: bool. x: the log ratios, clamped as the row's; 0 in masked cells; differentiable. advantages: one per token;
    per_row: one per sequence, [S], where they were given so, else None. aggregation: the call's mode.
    run_row(logp, old_logp, gate, token_weight): (loss, raw metrics) of the row. statistic_of(x, name): a statistic of x
    over each token's span, differentiable; x is 0 in masked cells.
    """

    layout: Layout
    logp: Tensor
    old_logp: Tensor
    valid: Tensor
    x: Tensor
    advantages: Tensor
    per_row: Tensor | None
    token_weight: Tensor | None
    starts: Tensor | None
    group_ids: Tensor | None
    aggregation: str
    normalizer: Tensor
    gate: Gate
    run_row: Callable[[Tensor, Tensor, Gate, Tensor | None], tuple[Tensor, Tensor]]
    statistic_of: Callable[[Tensor, str], Tensor]

    def run(
        self, *, log_ratio: Tensor | None = None, factor: Tensor | None = None, gate: Gate | None = None
    ) -> tuple[Tensor, Tensor]:
        """(loss, raw metrics) of the row. log_ratio: in place of logp - old_logp; factor: multiplies the weights; gate:
        in place of the row's."""
        weight = self.token_weight
        if factor is not None:  # a factor of 0 hides even an infinite weight
            weight = factor if weight is None else torch.where(factor != 0, factor * weight, 0)
        if log_ratio is None:
            return self.run_row(self.logp, self.old_logp, gate or self.gate, weight)
        pair = (log_ratio, torch.zeros_like(log_ratio))
        if "logp" in (gate or self.gate).slopes:  # the ratio is a constant to it
            pair = (self.logp, (self.logp - log_ratio).detach())
        loss, raw = self.run_row(*pair, gate or self.gate, weight)
        x = self.x.detach().double()  # the token's own
        return loss, self._with(raw, kl_sum=excess(x).sum(), log_ratio_sum=x.sum())

    def lengths(self) -> Tensor:
        """The number of valid tokens of each token's span, at least 1."""
        return self.statistic_of(self.valid.to(self.logp.dtype), "span_sum").clamp(min=1)

    def positions(self) -> Tensor:
        """The 1-based count of valid tokens in each token's span."""
        return self.statistic_of(self.valid.to(self.logp.dtype), "prefix_sum")

    def span(self) -> Tensor:
        """int64 [N]: a number for each token's span, rising from one to the next."""
        first = torch.zeros(self.valid.numel() + 1, dtype=torch.int64, device=self.valid.device)
        first[self.layout.cu_seqlens] = 1
        first = first[:-1] if self.starts is None else first[:-1] | self.starts.long()
        return first.cumsum(0) - 1

    def counted(self, raw: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The metrics with other counts of tokens below and above a bound."""
        entries = {"clip_low": low & self.valid, "clip_high": high & self.valid}
        positive = {f"{name}_pos": clipped & (self.advantages > 0) for name, clipped in entries.items()}
        return self._with(raw, **{name: clipped.sum() for name, clipped in (entries | positive).items()})

    def _with(self, raw: Tensor, **entries: Tensor) -> Tensor:
        raw = raw.clone()
        for name, value in entries.items():
            raw[RAW.index(name)] = value
        return raw
