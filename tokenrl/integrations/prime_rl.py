"""prime-rl 0.8. In its configuration:

    [trainer.loss]
    type = "custom"
    import_path = "tokenrl.integrations.prime_rl.loss"
    kwargs = { objective = "ctpo", eps_low = 0.03 }

Without an objective it is prime-rl's default loss, by tokenrl, with objective = "ipo" its IPO; the other kwargs are
then the settings of prime-rl's.
"""

import math
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import wrong
from ..losses.policy import policy_loss
from ..objectives.metrics import RAW
from ..objectives.policy import Objective
from ..objectives.policy import objective as row_of
from .hosts import at_least_fp32, check_fed, require
from .probes import adds_up_over_sequences

require("prime_rl")

OWN = {"default": "DefaultLossConfig", "ipo": "IPOLossConfig"}  # prime-rl's losses
SQUARE = row_of("kl_k2", clamp=math.inf)


def loss(inputs: Any, objective: str | Objective = "default", **parameters: Any) -> Any:
    """prime-rl: LossInputs of one sequence, tensors [seq]. Returns LossOutputs: the sum over its tokens, which prime-rl
    divides by their global count, and metrics, 0-d on the device.

    objective: a policy row of tokenrl's table with its parameters, "default" or "ipo". The old log-probs are the
    rollout's. kl_tau: of the squared log ratio, 0 beside a row where it is not given.
    """
    if objective in OWN:
        found = of_prime_rl(inputs, objective, configured(objective, tuple(parameters.items())))
    else:
        own = "kl_tau" in row_of(objective).gate.names  # a row with that term in it
        kl_tau = 0.0 if own else parameters.pop("kl_tau", 0.0)
        found = of_row(inputs, configured(objective, tuple(parameters.items())), kl_tau)
    return import_module("prime_rl.trainer.rl.loss").LossOutputs(*found)


@cache
def configured(name: str | Objective, parameters: tuple[tuple[str, Any], ...]) -> Any:
    """The row, or prime-rl's settings of a loss of its own."""
    if name in OWN:
        return getattr(import_module("prime_rl.configs.trainer"), OWN[str(name)])(**dict(parameters))
    row = row_of(name, **dict(parameters))
    check_fed("prime_rl", row)
    if not adds_up_over_sequences(row):
        raise wrong("objective", repr(row.name), "a row of single sequences, which is what prime_rl hands to its loss")
    return row


def summed(row: Objective, inputs: Any, weight: Tensor | None, advantages: Tensor, kl_tau: float) -> tuple[Tensor, Any]:
    """weight: of the row's term; the squared log ratio has prime-rl's alone."""
    logp, old = at_least_fp32(inputs.trainer_logprobs), inputs.inference_logprobs
    given: dict[str, Any] = {}
    if kl_tau != 0:
        own = torch.ones_like(old) if inputs.loss_weights is None else inputs.loss_weights
        given = {"ref_logp": old, "kl": SQUARE, "kl_coef": 2 * kl_tau, "kl_weight": own}
    return policy_loss(
        row, logp, old, advantages, mask=inputs.loss_mask, advantages_per="token",
        cu_seqlens=torch.tensor([0, logp.numel()], device=logp.device), token_weight=weight, aggregation="token-sum",
        **given,
    )  # fmt: skip


def of_row(inputs: Any, row: Objective, kl_tau: float) -> tuple[Tensor, dict[str, Tensor]]:
    found, metrics = summed(row, inputs, inputs.loss_weights, inputs.advantages, kl_tau)
    sums = dict(zip(RAW, metrics.raw, strict=False))
    names = {"is_masked_low": "clip_low", "is_masked_high": "clip_high", "mismatch_kl": "kl_sum"}
    return found, {name: sums[raw] / sums["tokens"].clamp(min=1) for name, raw in names.items()}


def of_prime_rl(inputs: Any, name: Any, settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The rows prime_rl and prime_rl_ipo, and what prime-rl reports of them."""
    logp, old, mask = inputs.trainer_logprobs.detach(), inputs.inference_logprobs, inputs.loss_mask
    moved, positive, negative = logp.exp() - old.exp(), inputs.advantages > 0, inputs.advantages < 0
    if name == "ipo":
        row, bound = "prime_rl_ipo", settings.ipo_threshold
        bounds = {"eps_low": bound, "eps_high": bound, "eps_back": bound}
        dropped = moved.abs() > bound
    else:
        row, bounds = "prime_rl", {"eps_low": settings.dppo_mask_low, "eps_high": settings.dppo_mask_high}
        high, low = moved > settings.dppo_mask_high, moved < -settings.dppo_mask_low
        dropped = torch.where(positive, high, low)
    objective = row_of(row, kl_tau=settings.kl_tau, **bounds)
    found, _ = summed(objective, inputs, inputs.loss_weights, settings.adv_tau * inputs.advantages, 0.0)
    mismatch, out = torch.expm1(logp - old) - (logp - old), mask & dropped
    metrics = {"masked_mismatch_kl": (mismatch, out), "unmasked_mismatch_kl": (mismatch, mask & ~dropped)}
    metrics["is_masked"] = (dropped, mask)
    if name != "ipo":
        metrics |= {"is_masked_low": (negative & low, mask), "is_masked_high": (positive & high, mask)}
        metrics |= {"masked_advantage_positive": (positive, out), "masked_advantage_negative": (negative, out)}
    return found, {key: mean(*pair) for key, pair in metrics.items()}


def mean(x: Tensor, among: Tensor) -> Tensor:
    """Of the tokens among those of a mask; 0 of none."""
    return torch.where(among, x, 0).sum() / among.sum().clamp(min=1)
