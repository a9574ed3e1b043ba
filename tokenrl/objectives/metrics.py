"""What a loss kernel saw, as one small tensor that is read with one host sync, when asked."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, distributed

from ..errors import described, wrong
from .excess import excess
from .gates.base import Gate

RAW = (
    "tokens", "ratio_sum", "ratio_min", "ratio_max", "clip_low", "clip_high", "clip_dual", "kl_sum", "ratio_squares",
    "log_ratio_sum", "clip_low_pos", "clip_high_pos",
)  # fmt: skip
EXTREMES = {"ratio_min": "amin", "ratio_max": "amax", "passes": "amax"}  # of parts; other entries add up
NOTHING = tuple({"ratio_min": math.inf, "ratio_max": -math.inf}.get(name, 0.0) for name in RAW)


def of_tokens(
    gate: Gate, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor, valid: Tensor
) -> dict[str, Tensor]:
    """What each token adds to the raw metrics, [N] by name, in masked cells nothing. s: the objective's statistic; x:
    the token's own log ratio; both without gradient."""
    ratio = torch.where(valid, s.double().exp(), 0)
    low, high, dual = (active & valid for active in gate.clipped(s, x, logp, advantages, t))
    x, positive = torch.where(valid, x.double(), 0), advantages > 0
    return {
        "tokens": valid,
        "ratio_sum": ratio,
        "ratio_min": torch.where(valid, ratio, math.inf),
        "ratio_max": torch.where(valid, ratio, -math.inf),
        "clip_low": low,
        "clip_high": high,
        "clip_dual": dual,
        "kl_sum": excess(x),
        "ratio_squares": ratio * ratio,
        "log_ratio_sum": x,
        "clip_low_pos": low & positive,
        "clip_high_pos": high & positive,
    }


class Metrics:
    """Metrics of one loss call over its valid tokens; `raw` is the kernel's tensor of sums, float64 [12], named by RAW.

    tokens: their count. ratio_mean, ratio_min, ratio_max: of the objective's own ratio e^s. clip_low, clip_high,
    clip_dual: the fraction of tokens on which that bound is active; clip_low_pos, clip_high_pos: of all tokens, those
    of them with A > 0. approx_kl: mean of e^x - 1 - x, x the token's log ratio (k3 of KL(old || new)); log_ratio_mean:
    of x (k1 with its sign turned). ess: effective sample size (sum r)^2 / (n sum r^2), in (0, 1], and nan
    where ratios are beyond e^354 or below e^-354. All nan when there is no token.
    """

    RAW: tuple[str, ...] = RAW
    NAMES: tuple[str, ...] = (
        "tokens", "ratio_mean", "ratio_min", "ratio_max", "clip_low", "clip_high", "clip_dual", "approx_kl", "ess",
        "log_ratio_mean", "clip_low_pos", "clip_high_pos",
    )  # fmt: skip

    def __init__(self, raw: Tensor):
        self.raw = raw

    @staticmethod
    def merged(parts: "Sequence[AnyMetrics]") -> "AnyMetrics":
        """The metrics of a whole from those of its parts, micro-batches for one: all of one class.

        Sums add up, ratio_min, ratio_max and passes by their minimum and maximum. kl and entropy of TermMetrics add up
        as the losses do: where each part is divided by the normalizer of the whole. What is one per token, logp and
        token_entropy of LinearMetrics, is not merged and missing."""
        if not isinstance(parts, Sequence) or not parts:
            raise wrong("parts", described(parts), "a list of Metrics, one at least")
        kind = type(parts[0])
        for part in parts:
            if not isinstance(part, Metrics) or type(part) is not kind:
                raise wrong("parts", f"{described(parts[0])} and {described(part)}", "metrics of one class")
        return parts[0]._pooled(torch.stack([part.raw for part in parts]))

    def reduce(self: "AnyMetrics", group: "distributed.ProcessGroup | None" = None) -> "AnyMetrics":
        """Those of all ranks of a process group (None: the default one), merged, in every rank: one all_gather and no
        host sync. Without an initialised group, these."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        from .. import wire  # of builds of torch without process groups there is none

        return self._pooled(wire.all_gather(self.raw, group or distributed.distributed_c10d._get_default_group()))

    def _pooled(self: "AnyMetrics", raws: Tensor) -> "AnyMetrics":
        """raws: [parts, len(RAW)]."""
        whole = raws.sum(0)
        for at, name in enumerate(self.RAW):
            if name in EXTREMES:
                whole[at] = getattr(raws[:, at], EXTREMES[name])()
        made = type(self).__new__(type(self))
        made.raw = whole
        return made

    @cached_property
    def _read(self) -> dict[str, float]:
        return self._named(self.raw.tolist())

    def _named(self, raw: list[float]) -> dict[str, float]:
        sums = dict(zip(RAW, raw, strict=True))
        n = sums["tokens"]
        if n == 0:
            return dict.fromkeys(Metrics.NAMES, math.nan) | {"tokens": 0}
        return {
            "tokens": int(n),
            "ratio_mean": sums["ratio_sum"] / n,
            "ratio_min": sums["ratio_min"],
            "ratio_max": sums["ratio_max"],
            "clip_low": sums["clip_low"] / n,
            "clip_high": sums["clip_high"] / n,
            "clip_dual": sums["clip_dual"] / n,
            "approx_kl": sums["kl_sum"] / n,
            "ess": sums["ratio_sum"] ** 2 / (n * sums["ratio_squares"]) if sums["ratio_squares"] > 0 else math.nan,
            "log_ratio_mean": sums["log_ratio_sum"] / n,
            "clip_low_pos": sums["clip_low_pos"] / n,
            "clip_high_pos": sums["clip_high_pos"] / n,
        }

    def as_dict(self) -> dict[str, float]:
        """All metrics by name; one host sync on the first read."""
        return dict(self._read)

    def __getattr__(self, name: str) -> float:
        if name in self.NAMES:
            return self._read[name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(self.NAMES)}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value:.4g}' for key, value in self._read.items())})"


AnyMetrics = TypeVar("AnyMetrics", bound=Metrics)


class TermMetrics(Metrics):
    """Metrics of a loss with other terms: those of Metrics, and kl, entropy: sum_t w_t of the KL estimates (0 without
    ref_logp) and of the entropies (0 without them), before their coefficients. raw [14]."""

    RAW = (*Metrics.RAW, "kl", "entropy")
    NAMES = (*Metrics.NAMES, "kl", "entropy")

    def _named(self, raw: list[float]) -> dict[str, float]:
        *sums, kl, entropy = raw
        return super()._named(sums) | {"kl": kl, "entropy": entropy}


class LinearMetrics(TermMetrics):
    """Metrics of linear_policy_loss: those of TermMetrics over the tokens that were computed, and, raw [16]:

    passes: over the logits; 2 where the gradients needed them again. left_out: valid tokens that entered no GEMM
    because the advantages of their sequence are zero.
    logp, token_entropy: tensors of the shape of ids, without gradient, 0 where a token entered no GEMM; not of merged
    metrics.
    """

    RAW = (*TermMetrics.RAW, "passes", "left_out")
    NAMES = (*TermMetrics.NAMES, "passes", "left_out")

    def __init__(self, raw: Tensor, logp: Tensor, token_entropy: Tensor):
        super().__init__(raw)
        self.logp, self.token_entropy = logp, token_entropy

    def _named(self, raw: list[float]) -> dict[str, float]:
        *terms, passes, left_out = raw
        return super()._named(terms) | {"passes": int(passes), "left_out": int(left_out)}
