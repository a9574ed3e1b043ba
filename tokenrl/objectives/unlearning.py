"""THE table of unlearning objectives: name = what pushes the tokens to forget down, and what holds the others.

A forget term meets the log-prob of a token, or the score of a sequence: the sum over its tokens to forget, or their
mean. Each gives its loss and, on the next line, the derivative; arguments are fp64. sigma is the logistic function.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..batch.checks import check_name, check_number
from ..errors import described, wrong
from .changes import changed
from .gates.base import Range, check_params, parametrised

STATISTICS = {
    "token": "x = logp_t - ref_logp_t of each token to forget; the mean over these tokens",
    "sum": "x = sum_t (logp_t - ref_logp_t) over the tokens to forget of a sequence; the mean over sequences with any",
    "mean": "the same divided by the number of these tokens",
}


@parametrised
class Forget:
    """Base of all forget terms."""

    names: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]
    ranges: ClassVar[Mapping[str, Range]]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        check_params(self)
        if hasattr(self, "beta"):
            check_number("beta", self.beta, above=0)

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} is no forget term: it defines no of")


@parametrised
class Ascent(Forget):
    """x: gradient ascent on cross entropy, without a bound."""

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.ones_like(x)


@parametrised
class Unlikelihood(Forget):
    """-log(1 - e^x), 1 - e^x at least floor, below which there is no gradient."""

    floor: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("floor", self.floor, above=0)

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rest = -x.expm1()
        bounded = rest.clamp(min=self.floor)
        return -bounded.log(), torch.where(rest > self.floor, (1 - bounded) / bounded, 0)


@parametrised
class Suppression(Forget):
    """log(1 + e^(beta x)): ascent where a token is likely, and less of it as it is forgotten."""

    beta: float = 0.1

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return -logsigmoid(-self.beta * x), self.beta * (self.beta * x).sigmoid()


@parametrised
class Npo(Forget):
    """-2 / beta log sigma(-beta x)."""

    beta: float = 0.1

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return -2 / self.beta * logsigmoid(-self.beta * x), 2 * (self.beta * x).sigmoid()


@parametrised
class SimNpo(Forget):
    """-2 / beta log sigma(-beta x - gamma). The authors' code multiplies its gamma by beta, the paper's is this one."""

    beta: float = 2.5
    gamma: float = 0.0

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = self.beta * x + self.gamma
        return -2 / self.beta * logsigmoid(-u), 2 * u.sigmoid()


@dataclass(frozen=True, eq=False)
class Unlearning:
    """One unlearning objective: retain L_r + forget (alpha L_f + smoothing L_s) + eos L_e.

    term: what L_f is the mean of, over the spans of statistic, a name of the table above. reference: "given", log
    ratios to it, or "none", log-probs alone. L_r, L_e: the means of -logp over the tokens to retain and over the ends
    of sequences among them. L_s: the mean of a divergence over the tokens to forget, of losses/unlearning.py's
    smoothing_kl. source, certainty: as for tokenrl.Objective.
    """

    name: str
    term: Forget
    source: str
    statistic: str = "token"
    reference: str = "none"
    retain: float = 1.0
    forget: float = 1.0
    eos: float = 0.0
    alpha: float = 1.0
    smoothing: float = 0.0
    certainty: str = ""

    def __post_init__(self) -> None:
        check_name("statistic", self.statistic, STATISTICS)
        check_name("reference", self.reference, ("given", "none"))
        if not isinstance(self.term, Forget):
            raise wrong("term", described(self.term), "a forget term of tokenrl/objectives/unlearning.py")
        for name in COEFS:
            check_number(name, getattr(self, name), 0)
        if self.smoothing and self.statistic != "token":
            raise wrong("smoothing", self.smoothing, "0 where the forget term is of sequences")

    @property
    def parts(self) -> dict[str, Forget]:
        """What holds the parameters."""
        return {"term": self.term}


COEFS = ("retain", "forget", "eos", "alpha", "smoothing")

_ROWS = (
    Unlearning("ga", Ascent(), "arXiv 2210.01504, a mean over tokens as in TOFU's code", retain=0.0, certainty="T"),
    Unlearning("grad_diff", Ascent(), "TOFU, arXiv 2401.06121; weights as SimNPO's code configures it", certainty="T"),
    Unlearning("unlikelihood", Unlikelihood(), "arXiv 1908.04319; floor of its code in fairseq", certainty="TR"),
    Unlearning("npo", Npo(), "arXiv 2404.05868", "sum", "given", retain=0.0, certainty="T"),
    Unlearning("simnpo", SimNpo(), "arXiv 2410.07163; beta is our reading", "mean", retain=0.0,
               certainty="TR"),
    Unlearning("au", Suppression(), "arXiv 2605.01047: reconstructed from its abstract and a copy of its baselines",
               retain=5.0, forget=0.5, eos=1.0, alpha=0.7, smoothing=0.3, certainty="R"),
    Unlearning("au_ga", Ascent(), "the gradient ascent that AU is compared with, from a copy of its code",
               retain=5.0, forget=0.5, eos=1.0, certainty="T"),
)  # fmt: skip
UNLEARNINGS: dict[str, Unlearning] = {row.name: row for row in _ROWS}
_CHANGEABLE = ("term", "statistic", "reference", *COEFS)


def unlearning(name: str | Unlearning, **parameters: object) -> Unlearning:
    """A row of the table, with any of its parameters changed.

        tokenrl.unlearning("npo", beta=0.2, retain=1.0, reference="none")

    Args:
        name: of tokenrl.UNLEARNINGS, or a row.
        parameters: those of its term (beta, gamma, floor) and of the row itself (term, statistic, reference, retain,
            forget, eos, alpha, smoothing).

    Raises:
        ValueError: for an unknown name, naming the nearest, and for a value that a part does not accept.
    """
    if isinstance(name, Unlearning):
        row = name
    else:
        if not isinstance(name, str):
            raise wrong("objective", described(name), "a name of tokenrl.UNLEARNINGS, or what unlearning returns")
        check_name("objective", name, UNLEARNINGS)
        row = UNLEARNINGS[name]
    return changed(row, parameters, _CHANGEABLE)
