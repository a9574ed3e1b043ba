"""THE table of distillation objectives: name = divergence of a student p from a teacher r, and weights of tokens."""

import dataclasses
from dataclasses import dataclass

from ..batch.checks import check_name
from ..errors import described, unknown, wrong
from .aggregations import AGGREGATIONS
from .divergences import (
    AlphaBeta,
    CrossEntropy,
    Divergence,
    ForwardKl,
    Jsd,
    ReverseKl,
    SkewForwardKl,
    SkewReverseKl,
    TotalVariation,
    divergence,
)


@dataclass(frozen=True, eq=False)
class Distillation:
    """One distillation objective: sum_t w_t T_t^power D(p_t, r_t), both at temperature T.

    divergence: see tokenrl/objectives/divergences.py. power: of the temperature, 2 keeps the gradient's size whatever T
    is. aggregation: the method's own, used when a call names none. source, certainty: as for tokenrl.Objective.
    """

    name: str
    divergence: Divergence
    aggregation: str
    source: str
    power: float = 0.0
    certainty: str = ""

    def __post_init__(self) -> None:
        check_name("aggregation", self.aggregation, AGGREGATIONS)
        divergence(self.divergence)


_ROWS = (
    Distillation("kd", ForwardKl(), "token-mean", "Hinton et al. 2015", power=2.0, certainty="P"),
    Distillation("forward_kd", ForwardKl(), "token-mean", "TRL's GKD with beta 0", certainty="T"),
    Distillation("reverse_kd", ReverseKl(), "token-mean", "TRL's GKD with beta 1; AdaKD's rkd at T = 1", certainty="T"),
    Distillation("gkd", Jsd(), "token-mean", "arXiv 2306.13649 (TRL)", certainty="PT"),
    Distillation("skew_kd", SkewForwardKl(), "token-mean", "DistiLLM, arXiv 2402.03898 (AdaKD)", certainty="T"),
    Distillation("skew_reverse_kd", SkewReverseKl(), "token-mean", "DistiLLM, arXiv 2402.03898 (AdaKD)", certainty="T"),
    Distillation("ab_kd", AlphaBeta(), "token-mean", "ABKD, arXiv 2505.04560 (AdaKD)", certainty="T"),
    Distillation("soft_ce", CrossEntropy(), "token-mean", "Hinton et al. 2015: soft labels", certainty="P"),
    Distillation("tvd_kd", TotalVariation(), "token-mean", "f-distill, arXiv 2307.15190 (AdaKD)", certainty="T"),
)
DISTILLATIONS: dict[str, Distillation] = {row.name: row for row in _ROWS}
_CHANGEABLE = ("divergence", "aggregation", "power")


def distillation(name: str | Distillation, **parameters: object) -> Distillation:
    """A row of the table, with any of its parameters changed.

        tokenrl.distillation("gkd", beta=0.1)

    Args:
        name: of tokenrl.DISTILLATIONS, or a row.
        parameters: those of its divergence (beta, share, alpha) and of the row itself (divergence, aggregation, power).

    Raises:
        ValueError: for an unknown name, naming the nearest.
    """
    if isinstance(name, Distillation):
        row = name
    else:
        if not isinstance(name, str):
            raise wrong("objective", described(name), "a name of tokenrl.DISTILLATIONS, or what distillation returns")
        check_name("objective", name, DISTILLATIONS)
        row = DISTILLATIONS[name]
    changes = {key: value for key, value in parameters.items() if key in _CHANGEABLE}
    own: dict[str, float] = {key: value for key, value in parameters.items() if key not in changes}  # type: ignore[misc]
    for key in own:
        if key not in row.divergence.names:
            raise unknown(f"parameter of {row.name!r}", key, (*row.divergence.names, *_CHANGEABLE))
    if own:
        changes["divergence"] = divergence(row.divergence, **own)
    return dataclasses.replace(row, **changes) if changes else row  # type: ignore[arg-type]
