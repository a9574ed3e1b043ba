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
from ..losses.token_metrics import token_metrics
from ..objectives.policy import Objective, objective
from .hosts import PPO, Choice, check_parameters, rebind, require, weighed
from .lazy import when_imported

FUNCTIONS = "areal.utils.functional.functional"
Found = tuple[Tensor, dict[str, Any]]
CHOICE = Choice("areal")
_originals: dict[str, Any] = {}


def evaluate(
    row: Objective, own: bool, logp: Tensor, old: Tensor, advantages: Tensor, stat: dict[str, Any], loss_mask: Tensor,
    cu_seqlens: Tensor | None, level: str,
) -> Found:  # fmt: skip
    """(the sum over the tokens by AReaL's count, the statistics of each token). own: the row is AReaL's loss, else what
    AReaL's counted is counted anew; stat: AReaL's, with what it rejects of the rollout."""
    mask, count = stat.get("behave_mask", loss_mask.bool()), loss_mask.count_nonzero()
    shape: dict[str, Any] = {"mask": mask, "advantages_per": "token"}
    if logp.dim() == 1:
        ends = torch.tensor([0, len(logp)], device=logp.device) if cu_seqlens is None else cu_seqlens.long()
        shape["cu_seqlens"] = ends
    if own and level == "sequence":  # of which the mean advantage is taken
        lengths = ends.diff() if logp.dim() == 1 else torch.full((len(logp),), logp.shape[1], device=logp.device)
        masked = torch.where(mask, advantages, 0).double(), mask.double()
        total, tokens = (torch.segment_reduce(x.flatten(), "sum", lengths=lengths) for x in masked)
        advantages, shape["advantages_per"] = total / tokens.clamp(min=1), "sequence"
    old, weight = weighed(row, old, stat.get("behave_imp_weight"))
    how: dict[str, Any] = {"token_weight": weight, "aggregation": "token-mean", "normalizer": count.clamp(min=1)}
    loss, _ = policy_loss(row, logp, old, advantages, **how, **shape)
    if own:
        return loss, stat
    ours: dict[str, Any] = {"loss": loss.detach().expand_as(logp)}
    if row.form is None:
        found = token_metrics(row, logp, old, advantages, **shape)
        ours |= {"importance_weight": found.ratio, "clip_mask": found.clip_low | found.clip_high}
        ours["dual_clip_mask"] = found.clip_dual
    return loss, stat | ours


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
    rest = stat, loss_mask, cu_seqlens, importance_sampling_level
    return evaluate(row, chosen is None, logprobs, proximal_logprobs, advantages, *rest)


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
    rest = stat, loss_mask, cu_seqlens, importance_sampling_level
    return evaluate(row, chosen is None, logprobs, old_logprobs, advantages, *rest)


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
