"""ms-swift 4.6. A plugin of two lines, named by `--external_plugins`:

    from tokenrl.integrations import swift
    swift.use("ctpo", eps_low=0.03)

Without an objective, and without TOKENRL_OBJECTIVE, it is ms-swift's loss_type by tokenrl. ms-swift computes the
metrics it logs itself, without gradients, from the log-probs that are there already; its loss is what ours is held to.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import wrong
from ..losses.policy import policy_loss
from ..objectives.policy import Objective, objective
from .hosts import PPO, Choice, check_parameters, require, weighed
from .lazy import when_imported

TRAINER = "swift.rlhf_trainers.grpo_trainer"
PARAMETERS = ("self", "model", "model_inputs", "grpo_batch")
INF, TOLERANCE = math.inf, {"rtol": 1e-4, "atol": 1e-5}
LEVELS = {"token": ("token", "through"), "sequence": ("span_mean", "through"), "sequence_token": ("span_mean", "local")}
K3 = objective("kl_k3", ceiling=10.0)
CHOICE = Choice("swift")


def settings(trainer: Any) -> dict[str, dict[str, Any]]:
    """What rows take from ms-swift's arguments."""
    args, high, width = trainer.args, trainer.epsilon_high, trainer.fipo_clip_range
    # ms-swift's delta cuts the ratio before the minimum, for either sign of A: below the upper bound it is that bound.
    delta = INF if args.delta is None else args.delta
    ppo = {"eps_low": trainer.epsilon_low, "eps_high": min(high, delta - 1), "dual": max(delta, 1 + high), "clamp": INF}
    low = 1.0 if trainer.fipo_clip_high_only else 1 - (width or 0)
    future = {"half_life": args.fipo_decay_rate, "ceiling": delta, "safety": trainer.fipo_safety_threshold or INF}
    future |= {"holes": "count", "low": low if width else 0.0, "high": 1 + width if width else INF}
    return dict.fromkeys((*PPO, "gspo"), ppo) | {
        "cispo": {"eps_high": high, "clamp": INF},
        "sapo": {"tau_pos": trainer.tau_pos, "tau_neg": trainer.tau_neg, "clamp": INF},
        "fipo": ppo | future, "real": {"tau": trainer.real_tau},
    }  # fmt: skip


def own_row(trainer: Any) -> Objective:
    """ms-swift's loss_type."""
    known, kind = settings(trainer), trainer.loss_type
    level = dict(zip(("statistic", "flow"), LEVELS[trainer.importance_sampling_level], strict=True))
    if kind in ("fipo", "real"):
        return objective(kind, **known[kind])
    return objective(kind if kind in known else "ppo", **known.get(kind, known["ppo"]), **level)


def check_trainer(trainer: Any) -> None:
    """What no loss of ours goes with, before training."""
    args, row = trainer.args, CHOICE.row(settings(trainer))
    for name, given in (
        ("use_liger_kernel", args.use_liger_kernel), ("sdar_loss_coef", trainer.sdar_loss_coef),
        ("chord_sft_dataset", trainer.chord_sft_dataset),
    ):  # fmt: skip
        if given:
            raise wrong(name, given, "none; it is no part of tokenrl's loss")
    if trainer.loss_type == "real" and row is not None:
        raise wrong("loss_type", "'real'", f"another, which aggregates {row.name!r}")
    if trainer.loss_type == "real" and (trainer.overlong_filter or trainer.off_policy_sequence_mask_delta is not None):
        raise wrong("loss_type", "'real' that leaves rows out", "no overlong_filter and off_policy_sequence_mask_delta")
    if row is None and trainer.loss_type == "fipo" and trainer.importance_sampling_level != "token":
        raise wrong("importance_sampling_level", f"{trainer.importance_sampling_level!r} of 'fipo'", "'token'")


@contextmanager
def shadowed(trainer: Any, known: tuple[Tensor, Any]) -> Iterator[list[Any]]:
    """Within, ms-swift finds the log-probs that are known, and the weights that it makes of the rollout's are kept."""
    weights: list[Any] = []
    correction = trainer._get_rollout_is_correction

    def kept(*args: Any, **kwargs: Any) -> Any:
        found = correction(*args, **kwargs)
        weights.append(found[1])
        return found

    trainer._get_rollout_is_correction = kept
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: known
    try:
        yield weights
    finally:
        del trainer._get_rollout_is_correction, trainer._get_per_token_logps_and_entropies


def counts(trainer: Any, batch: Any, mask: Tensor) -> dict[str, Any]:
    """mask, aggregation and normalizer of loss_type."""
    rows, modes = len(mask), {"grpo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean", "real": "group-mean"}
    totals = {
        "grpo": rows, "sapo": rows, "bnpo": mask.sum().clamp(min=1), "dr_grpo": rows * trainer.max_completion_length,
        "real": rows // trainer.num_generations,
    }  # fmt: skip
    total = totals.get(trainer.loss_type)
    if total is None:
        total = batch.num_items_in_batch / trainer.accelerator.num_processes
    return {"mask": mask, "aggregation": modes.get(trainer.loss_type, "token-mean"), "normalizer": total}


def loss_of(
    trainer: Any, batch: Any, row: Objective, logp: Tensor, mask: Tensor, ratio: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Any]:
    """(loss, metrics of the row). ratio: of the rollout; keep: the tokens of top_entropy_quantile; None: all."""
    how = counts(trainer, batch, mask)
    old = logp.detach() if batch.old_per_token_logps is None else batch.old_per_token_logps
    if trainer.loss_type == "real":
        advantages = torch.where(mask, batch.advantages, 0).sum(1) / mask.sum(1).clamp(min=1)
        groups = torch.arange(len(mask), device=mask.device) // trainer.num_generations
        loss, metrics = policy_loss(row, logp, old, advantages, group_ids=groups, **how)
        how, ratio = {"mask": mask, "aggregation": "token-mean", "normalizer": mask.sum().clamp(min=1)}, None
    else:
        old, weight = weighed(row, old, ratio)
        if keep is not None:
            weight = keep.to(logp.dtype) if weight is None else weight * keep
        loss, metrics = policy_loss(row, logp, old, batch.advantages, token_weight=weight, **how)
    if trainer.beta != 0.0 and not trainer.kl_in_reward:
        kl, _ = policy_loss(K3, logp, batch.ref_per_token_logps, None, token_weight=ratio, **how)
        loss = loss + trainer.beta * kl
    return trainer._undo_gradient_accumulation_scaling(loss), metrics


def compute(original: Any, trainer: Any, *given: Any) -> tuple[Tensor, dict[str, Any]]:
    """GRPOTrainer._compute_loss_and_metrics; given: model, model_inputs, grpo_batch."""
    chosen = CHOICE.row(settings(trainer))
    logp, entropies = trainer._get_per_token_logps_and_entropies(*given, compute_entropy=trainer.compute_entropy)
    with torch.no_grad(), shadowed(trainer, (logp.detach(), entropies)) as weights:
        theirs, found = original(trainer, *given)
    threshold = found["entropy"].get("entropy_threshold")
    keep = None if threshold is None else entropies >= threshold
    row, mask = chosen or own_row(trainer), found["completion_mask"]
    loss, metrics = loss_of(trainer, given[2], row, logp, mask, weights[0] if weights else None, keep)
    if chosen is not None:  # ms-swift's counts are of its loss_type
        found = {key: value for key, value in found.items() if key not in ("clipping", "fipo")}
    elif not torch.allclose(loss.detach(), theirs.to(loss.dtype), **TOLERANCE, equal_nan=True):
        values = f"{loss.item():.6g} from tokenrl, {theirs.item():.6g} from ms-swift"
        raise wrong("loss", values, f"a relative difference of {TOLERANCE['rtol']}")
    for name, value in metrics.as_dict().items():
        trainer._metrics[found["mode"]][f"tokenrl/{name}"].append(value)
    return loss, found


def use(name: str | Objective | None = None, **parameters: Any) -> None:
    """The loss of every GRPOTrainer of ms-swift in this process, now or as soon as it is imported. name, parameters: a
    row of tokenrl's table. Again: another objective."""
    require("swift")
    CHOICE.take(name, parameters)
    when_imported(TRAINER, _patch)


def _patch(module: ModuleType) -> None:
    trainer = module.GRPOTrainer
    if hasattr(trainer, "tokenrl"):
        return
    original, prepare = trainer._compute_loss_and_metrics, trainer._prepare_algorithm_params
    check_parameters("GRPOTrainer._compute_loss_and_metrics", original, PARAMETERS)

    def prepared(self: Any) -> None:
        prepare(self)
        check_trainer(self)

    def computed(self: Any, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        return compute(original, self, model, model_inputs, grpo_batch)

    trainer._compute_loss_and_metrics, trainer._prepare_algorithm_params, trainer.tokenrl = computed, prepared, True
