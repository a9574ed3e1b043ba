"""Scores: f'(e^x) of an f-divergence at a sequence's log ratio x, in place of x, with its derivative on the next line.

csrc/links.h and triton_kernels/links.py have the same.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .gates.base import Range, parametrised


@parametrised
class Score:
    """Base of all scores: x itself, of the reverse KL. name and params(): as those of a link."""

    name: ClassVar[str] = "reverse_kl"
    names: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]
    ranges: ClassVar[Mapping[str, Range]]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def params(self) -> list[float]:
        return [float(getattr(self, name)) for name in self.names]

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.ones_like(x)


@parametrised
class ForwardKlScore(Score):
    """1 - e^-x."""

    name = "forward_kl"

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return -(-x).expm1(), (-x).exp()


@parametrised
class JsScore(Score):
    """log 2 + log sigma(x)."""

    name = "js"

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return math.log(2) + logsigmoid(x), (-x).sigmoid()


@parametrised
class AlphaScore(Score):
    """(e^((alpha - 1) x) - 1) / (alpha - 1), x where alpha is 1."""

    name = "alpha"
    alpha: float = 0.5

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.alpha == 1:
            return x, torch.ones_like(x)
        power = (self.alpha - 1) * x
        return power.expm1() / (self.alpha - 1), power.exp()


SCORES: dict[str, type[Score]] = {score.name: score for score in (Score, ForwardKlScore, JsScore, AlphaScore)}
