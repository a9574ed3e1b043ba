"""Objectives whose gradient flows through logp alone, and LUSPO, against the official implementations, in fp64."""

import math

import pytest
import torch
from golden_data import INDEX, arrays, near
from golden_losses import DETACHED, grid, leaf, weight

import tokenrl
from tokenrl.objectives.gates.base import INF as OFF

VESPO = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
TRL = ("trl_luspo", "trl_vespo")
VERL = tuple(family for family in DETACHED if family not in TRL)


def verl_objective(family, config):
    if family in ("verl_gpg", "verl_reinforce"):
        return tokenrl.objective(family.removeprefix("verl_"))
    if family == "verl_dro":
        return tokenrl.objective("dro", beta=config["dro_beta"])
    name = family.removeprefix("verl_") if family.startswith("verl") else config["loss_mode"].replace("binary_", "")
    bounds = {"eps_low": config["clip_ratio_low"], "eps_high": config["clip_ratio_high"]}
    return tokenrl.objective(name, **bounds, ceiling=config["clip_ratio_c"])


# Divergences that are given: test_golden_forms.py.
BINARY = [param for param in grid(*VERL) if "topk" not in param.values[1]]


@pytest.mark.parametrize("family,case,backend", BINARY)
def test_verl(family, case, backend):
    entry = INDEX[family]["cases"][case]
    x, logp = leaf(arrays(family, case), backend)
    old_logp = x["old_logp"] if "old_logp" in x else x["rollout_logp"]
    loss, metrics = tokenrl.policy_loss(
        verl_objective(family, entry["config"]), logp, old_logp, x["advantages"], mask=x["mask"],
        token_weight=weight(x, logp), aggregation=entry["config"]["loss_agg_mode"], backend=backend,
    )  # fmt: skip
    truth = arrays(family, case)
    # verl's weights are e^-20 at least, those of the authors and tokenrl are not.
    far = (logp - old_logp < -20).cpu() if family.startswith("verl_dppo") else torch.zeros_like(truth["mask"])
    near(loss, truth["loss"], "loss", rtol=math.exp(-20) if far.any() else 1e-9)
    gradient = torch.autograd.grad(loss, logp)[0].cpu()
    near(torch.where(far, 0, gradient), torch.where(far, 0, truth["grad_logp"]), "gradient")
    if "metrics" in entry:
        # The official counter is a mean in fp32.
        assert metrics.clip_low + metrics.clip_high == pytest.approx(entry["metrics"]["actor/pg_clipfrac"], abs=1e-6)


def trl_objective(config):
    if config["loss_type"] == "vespo":
        return tokenrl.objective("vespo", floor=math.log(1e-8), **{name: config[f"vespo_{name}"] for name in VESPO})
    delta = OFF if config["delta"] is None else config["delta"]
    bounds = {"eps_low": config["epsilon_low"], "eps_high": config["epsilon_high"]}
    return tokenrl.objective("luspo", **bounds, dual=delta)


@pytest.mark.parametrize("family,case,backend", grid(*TRL))
def test_trl(family, case, backend):
    config = INDEX[family]["cases"][case]["config"]
    x, logp = leaf(arrays(family, case), backend)
    normalizer = x["mask"].shape[0] * config["grad_accum"]  # fully masked rows count
    if family == "trl_vespo":
        normalizer = config["num_items_in_batch"] * config["grad_accum"] / config["steps_per_generation"]
    loss, _ = tokenrl.policy_loss(
        trl_objective(config), logp, x.get("old_logp"), x["advantages"], mask=x["mask"],
        token_weight=weight(x, logp), normalizer=normalizer, backend=backend,
    )  # fmt: skip
    near(loss, arrays(family, case)["loss"], "loss")
    near(torch.autograd.grad(loss, logp)[0], arrays(family, case)["grad_logp"], "gradient")
