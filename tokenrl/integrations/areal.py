"""AReaL 1.0.4. It asks for torch below 2.11, tokenrl's oldest: use() says so where that version is installed, and works
where a later one asks for another. In the processes that train:

    from tokenrl.integrations import areal
    areal.use("ctpo", eps_low=0.03)

Without an objective, and without TOKENRL_OBJECTIVE, the losses are AReaL's own, by tokenrl. Its statistics of each
token and its rejection of tokens of the rollout AReaL computes itself, without gradient.
"""

import math
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..losses.policy import policy_loss
from ..objectives.policy import Objective, objective
from .hosts import PPO, Choice, check_parameters, rebind, require, weighed
from .lazy import when_imported

FUNCTIONS = "areal.utils.functional.functional"
Found = tuple[Tensor, dict[str, Any]]
CHOICE = Choice("areal")
_originals: dict[str, Any] = {}


def evaluate(
    row: Objective, logp: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, cu_seqlens: Tensor | None,
    count: Tensor, of_rows: bool, weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The sum over the tokens by AReaL's count. of_rows: their advantages are the means of their sequences."""
    shape: dict[str, Any] = {"advantages_per": "token"}
    if logp.dim() == 1:
        ends = torch.tensor([0, len(logp)], device=logp.device) if cu_seqlens is None else cu_seqlens.long()
        shape["cu_seqlens"] = ends
    if of_rows:
        lengths = ends.diff() if logp.dim() == 1 else torch.full((len(logp),), logp.shape[1], device=logp.device)
        masked = torch.where(mask, advantages, 0).double(), mask.double()
        total, tokens = (torch.segment_reduce(x.flatten(), "sum", lengths=lengths) for x in masked)
        advantages, shape["advantages_per"] = total / tokens.clamp(min=1), "sequence"
    old, weight = weighed(row, old, weight)
    loss, _ = policy_loss(
        row, logp, old, advantages, mask=mask, token_weight=weight, aggregation="token-mean",
        normalizer=count.clamp(min=1), **shape,
    )  # fmt: skip
    return loss


def ppo_actor_loss_fn(
    logprobs: Tensor, proximal_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, eps_clip: float,
    loss_mask: Tensor, eps_clip_higher: float | None = None, c_clip: float | None = None,
    rejection_sampling: Any = None, importance_sampling_level: str = "token", cu_seqlens: Tensor | None = None,
) -> Found:  # fmt: skip
    """AReaL: tensors [N] with cu_seqlens, or [B, T]. Returns (loss, AReaL's statistics of each token)."""
    given = dict(locals())
    with torch.no_grad():
        _, stat = _originals["ppo_actor_loss_fn"](**given)
    bounds = {"eps_low": eps_clip, "eps_high": eps_clip if eps_clip_higher is None else eps_clip_higher}
    ppo = bounds | {"dual": c_clip or math.inf, "clamp": math.inf}
    chosen, of_rows = CHOICE.row(dict.fromkeys((*PPO, "gspo"), ppo)), importance_sampling_level == "sequence"
    row = chosen or objective("gspo" if of_rows else "ppo", **ppo)
    mask, count = stat.get("behave_mask", loss_mask.bool()), loss_mask.count_nonzero()
    how = cu_seqlens, count, of_rows and chosen is None, stat.get("behave_imp_weight")
    return evaluate(row, logprobs, proximal_logprobs, advantages, mask, *how), stat


def sapo_loss_fn(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, tau_pos: float, tau_neg: float, loss_mask: Tensor,
    importance_sampling_level: str = "token", cu_seqlens: Tensor | None = None,
) -> Found:  # fmt: skip
    given = dict(locals())
    with torch.no_grad():
        _, stat = _originals["sapo_loss_fn"](**given)
    own, of_rows = {"tau_pos": tau_pos, "tau_neg": tau_neg, "clamp": math.inf}, importance_sampling_level == "sequence"
    chosen = CHOICE.row({"sapo": own})
    row = chosen or objective("sapo", **own, statistic="span_mean" if of_rows else "token")
    mask, count = loss_mask.bool(), loss_mask.count_nonzero()
    return evaluate(row, logprobs, old_logprobs, advantages, mask, cu_seqlens, count, of_rows and not chosen), stat


STAND_INS: dict[str, Any] = {"ppo_actor_loss_fn": ppo_actor_loss_fn, "sapo_loss_fn": sapo_loss_fn}


def check_torch() -> None:
    """ImportError where the installed AReaL asks for another torch than this."""
    from packaging.requirements import Requirement

    for asked in map(Requirement, metadata.requires("areal") or []):
        here = asked.name == "torch" and (asked.marker is None or asked.marker.evaluate({"extra": ""}))
        if here and not asked.specifier.contains(torch.__version__.split("+")[0]):
            raise ImportError(f"torch: got {torch.__version__}, accepted: torch{asked.specifier}, which AReaL asks for")


def use(name: str | Objective | None = None, **parameters: Any) -> None:
    """AReaL's losses of this process, now or as soon as they are imported. name, parameters: a row of tokenrl's table.
    Again: another objective."""
    require("areal")
    check_torch()
    CHOICE.take(name, parameters)
    when_imported(FUNCTIONS, _replace)


def _replace(module: ModuleType) -> None:
    for name, ours in STAND_INS.items():
        found = getattr(module, name)
        if found is not ours:
            check_parameters(f"AReaL's {name}", found, ours)
            _originals[name] = found
            rebind("areal", {name: found}, {name: ours})
