"""The losses of TRL's and Liger's GRPO as rows of the table."""

import math

from ..objectives.policy import Objective, objective

LEVELS = {"token": "token", "sequence": "span_mean"}  # importance_sampling_level -> statistic
LEAST, MOST = math.log(1e-8), 20.0  # their bounds of vespo's log weights: of a rollout's ratio and of a sequence's
VESPO = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")


def grpo_objective(
    loss_type: str, level: str, eps_low: float, eps_high: float, delta: float | None, sapo: tuple[float, float],
    vespo: dict[str, float],
) -> Objective:  # fmt: skip
    """The row of a loss_type. sapo: its temperatures of positive and negative advantages; vespo: by VESPO."""
    statistic = LEVELS[level]
    if loss_type == "cispo":
        return objective("cispo", statistic=statistic, eps_high=eps_high, clamp=math.inf)
    if loss_type == "sapo":
        return objective("sapo", statistic=statistic, tau_pos=sapo[0], tau_neg=sapo[1], clamp=math.inf)
    if loss_type == "vespo":
        return objective("vespo", floor=LEAST, **vespo)
    # delta cuts the ratio before the minimum, for either sign of A: below the upper bound it is that bound.
    delta = math.inf if delta is None else delta
    return objective(
        "ppo", statistic=statistic, clamp=math.inf, eps_low=eps_low, eps_high=min(eps_high, delta - 1),
        dual=max(delta, 1 + eps_high),
    )  # fmt: skip
