"""Policy losses against outputs of the official implementations (tests/golden), in fp64."""

import pytest
import torch
from golden_data import INDEX, arrays, near
from golden_losses import DETACHED, grid, leaf, weight

import tokenrl
from tokenrl.objectives.gates.base import INF as OFF
from tokenrl.objectives.gates.bounded import PpoClip, Sapo
from tokenrl.objectives.gates.weighted import Cispo

VERL = ("ctpo", "verl_vanilla", "verl_gspo", "verl_sapo", "verl_cispo")
TRL = ("trl_grpo", "trl_bnpo", "trl_dr_grpo", "trl_dapo", "trl_cispo", "trl_sapo", "trl_gspo_token")


def verl_objective(family, config):
    """The row that a config of verl (or of CTPO's fork of it) means."""
    if family == "ctpo":
        name = "ctpo" if "cumprod" in config["registered"] else "ctpo_geomean"
        if not config["registered"].endswith("-la"):
            gate = PpoClip(config["clip_ratio_low"], config["clip_ratio_high"], config["clip_ratio_c"])
            return tokenrl.objective(name, gate=gate)
        low, high, dual = (config[f"la_clip_{key}"] for key in ("low", "high", "c"))
        return tokenrl.objective(name, eps_low=low, eps_high=high, eps_dual=dual, power=config["clip_ratio_la_power"])
    if family == "verl_sapo":
        return tokenrl.objective("sapo", tau_pos=config["tau_pos"], tau_neg=config["tau_neg"])
    bounds = {"eps_low": config["clip_ratio_low"], "eps_high": config["clip_ratio_high"]}
    more = {
        "verl_vanilla": {"dual": config.get("clip_ratio_c")}, "verl_gspo": {}, "verl_cispo": {"bound": "relative"},
    }[family]  # fmt: skip
    return tokenrl.objective(
        {"verl_vanilla": "ppo", "verl_gspo": "gspo_token", "verl_cispo": "cispo"}[family], **bounds, **more
    )


@pytest.mark.parametrize("family,case,backend", grid(*VERL))
def test_verl(family, case, backend):
    entry = INDEX[family]["cases"][case]
    config = entry["config"]
    x, logp = leaf(arrays(family, case), backend)
    loss, metrics = tokenrl.policy_loss(
        verl_objective(family, config), logp, x["old_logp"], x["advantages"], mask=x["mask"],
        token_weight=weight(x, logp), aggregation=config["loss_agg_mode"], backend=backend,
    )  # fmt: skip
    near(loss, arrays(family, case)["loss"], "loss")
    near(torch.autograd.grad(loss, logp)[0], arrays(family, case)["grad_logp"], "gradient")
    if family == "verl_sapo":
        return  # nothing is clipped
    # The official counters are means in fp32.
    assert metrics.clip_low + metrics.clip_high == pytest.approx(entry["metrics"]["actor/pg_clipfrac"], abs=1e-6)
    assert metrics.clip_dual == pytest.approx(entry["metrics"]["actor/pg_clipfrac_lower"], abs=1e-6)
    if family == "ctpo":
        # The cap shows in the ratio only: a clip hides it from the loss.
        for name, ours in CTPO_METRICS.items():
            unit = metrics.tokens if name.endswith("count") else 1
            recorded = entry["metrics"][f"pg_update/{name}"]
            assert getattr(metrics, ours) * unit == pytest.approx(recorded, rel=1e-9, abs=0), name


CTPO_METRICS = {
    "clip/low/count": "clip_low", "clip/high/count": "clip_high", "clip/dual/count": "clip_dual",
    "is_ratio/min": "ratio_min", "is_ratio/max": "ratio_max", "is_ratio/mean": "ratio_mean",
}  # fmt: skip


def verl_normalizer(config):
    """What agg_loss divides by in distributed training: the global count over the number of ranks."""
    if "dp_size" not in config:
        return None
    mode = config["loss_agg_mode"]
    if mode == "token-sum":
        return 1 / config["dp_size"]
    if mode == "token-mean":
        return config["batch_num_tokens"] / config["dp_size"]
    return (
        config["global_batch_size"] / config["dp_size"] * (config["loss_scale_factor"] if mode.endswith("norm") else 1)
    )


@pytest.mark.parametrize("family,case,backend", grid("verl_agg_loss"))
def test_verl_aggregation(family, case, backend):
    config = INDEX[family]["cases"][case]["config"]
    x, values = leaf(arrays(family, case), backend)
    how = {"mask": x["mask"], "normalizer": verl_normalizer(config), "backend": backend}
    loss = tokenrl.group_aggregate(values, config["loss_agg_mode"], **how)
    near(loss, arrays(family, case)["loss"], "loss")
    near(torch.autograd.grad(loss, values)[0], arrays(family, case)["grad_loss_mat"], "gradient")


KL = {
    "k1": ("kl_k1", {"clamp": OFF}), "kl": ("kl_k1", {"clamp": OFF}), "k1+": ("kl_k1_unbiased", {"clamp": OFF}),
    "abs": ("kl_abs", {"clamp": OFF}), "abs+": ("kl_abs_unbiased", {"clamp": OFF}),
    "k2": ("kl_k2", {"clamp": OFF}), "mse": ("kl_k2", {"clamp": OFF}),
    "k3": ("kl_k3", {"ceiling": 10.0}), "low_var_kl": ("kl_k3", {"ceiling": 10.0}),
    "k3+": ("kl_k3_unbiased", {"ceiling": 10.0, "clamp": OFF}),
}  # fmt: skip


@pytest.mark.parametrize("family,case,backend", grid("verl_kl_penalty"))
def test_verl_kl(family, case, backend):
    kind = INDEX[family]["cases"][case]["config"]["kl_penalty"]
    x, logp = leaf(arrays(family, case), backend)
    name, changes = KL[kind]
    w = 1 + torch.arange(logp.numel(), dtype=torch.float64).cos().view_as(logp) / 2  # tells the cells apart in the sum
    loss, _ = tokenrl.policy_loss(
        tokenrl.objective(name, **changes), logp, x["ref_logp"], None, aggregation="token-sum",
        token_weight=w.to(logp.device), backend=backend,
    )  # fmt: skip
    near(loss, (w * arrays(family, case)["kl"]).sum(), "loss")
    near(torch.autograd.grad(loss, logp)[0], w * arrays(family, case)["grad_logp"], "gradient")


def trl_objective(config):
    """TRL clamps no log ratio; its delta bounds the unclipped ratio, which is the dual clip."""
    kind, level = config["loss_type"], config["importance_sampling_level"]
    if kind == "cispo":
        gate = Cispo(eps_high=config["epsilon_high"])
    elif kind == "sapo":
        gate = Sapo(config["sapo_temperature_pos"], config["sapo_temperature_neg"])
    else:
        gate = PpoClip(
            config["epsilon_low"], config["epsilon_high"], OFF if config["delta"] is None else config["delta"]
        )
    statistic, flow = {
        "token": ("token", "through"), "sequence": ("span_mean", "through"), "sequence_token": ("span_mean", "local"),
    }[level]  # fmt: skip
    return tokenrl.objective("grpo", gate=gate, statistic=statistic, flow=flow, clamp=OFF)


def trl_aggregation(family, config, mask):
    """(mode, normalizer): TRL counts fully masked rows."""
    rows, steps = mask.shape[0], config["grad_accum"]
    kind = config["loss_type"]
    if kind in ("grpo", "sapo"):
        return "seq-mean-token-mean", rows * steps
    if kind == "bnpo":
        return "token-mean", int(mask.sum()) * steps
    if kind == "dr_grpo":
        return "seq-mean-token-sum-norm", rows * config["max_completion_length"] * steps
    share = 1 if family == "trl_gspo_token" else steps / config["steps_per_generation"]
    return "token-mean", config["num_items_in_batch"] * share


def uncertain(config, x):
    """bool: the valid tokens whose entropy is in the top quantile (the quantile is taken in fp32)."""
    entropy = x["entropy"].float()
    return x["mask"] & (entropy >= entropy[x["mask"]].quantile(1 - config["top_entropy_quantile"]))


def trl_token_weight(config, x, logp):
    """Importance weights, tokens of low entropy, rows that are too far off-policy: all of them factors of the loss."""
    w = torch.ones_like(logp, requires_grad=False) if (w := weight(x, logp)) is None else w
    if config["top_entropy_quantile"] < 1:
        w = w * uncertain(config, x)
    if config.get("off_policy_mask_threshold") is not None:
        n = x["mask"].sum(1).clamp(min=1)
        drift = torch.where(x["mask"], x["rollout_logp"] - logp.detach(), 0).sum(1) / n
        w = w * ~((drift > config["off_policy_mask_threshold"]) & (x["advantages"] < 0))[:, None]
    return w


def trl_kl(config, x, logp, call):
    """k3, times the objective's ratio when bias-corrected (value r k3; at token level its gradient: r (logp - ref))."""
    if not config.get("use_bias_correction_kl"):
        return call(tokenrl.objective("kl_k3", clamp=OFF), logp, x["ref_logp"], None)
    d = torch.where(x["mask"], logp - x.get("old_logp", logp), 0).detach()
    if config["importance_sampling_level"] == "token":
        return call(tokenrl.objective("kl_k3_unbiased", clamp=OFF), logp, x["ref_logp"], None, token_weight=d.exp())
    ratio = (d.sum(1, keepdim=True) / x["mask"].sum(1, keepdim=True).clamp(min=1)).exp().expand_as(logp).contiguous()
    direct = call(tokenrl.objective("kl_k3", clamp=OFF), logp, x["ref_logp"], None, token_weight=ratio)
    # The ratio of a row depends on every token: its own gradient is that of -A r with A = -k3.
    gap = (x["ref_logp"] - logp).detach()
    carrier = tokenrl.objective("gspo", eps_low=OFF, eps_high=OFF)
    through = call(carrier, logp, x["old_logp"], -(torch.expm1(gap) - gap))
    return direct + through - through.detach()


@pytest.mark.parametrize("family,case,backend", grid(*TRL))
def test_trl(family, case, backend):
    entry = INDEX[family]["cases"][case]
    config = entry["config"]
    x, logp = leaf(arrays(family, case), backend)
    mode, normalizer = trl_aggregation(family, config, x["mask"])
    reported = []

    def call(objective, *tensors, **more):
        how = {"mask": x["mask"], "aggregation": mode, "normalizer": normalizer, "backend": backend}
        loss, metrics = tokenrl.policy_loss(objective, *tensors, **how, **more)
        reported.append(metrics)
        return loss

    token_weight = trl_token_weight(config, x, logp)
    loss = call(trl_objective(config), logp, x.get("old_logp"), x["advantages"], token_weight=token_weight)
    if config["beta"]:
        loss = loss + config["beta"] * trl_kl(config, x, logp, call)
    if config.get("entropy_coef"):
        bonus = tokenrl.group_aggregate(x["entropy"], "token-mean", mask=uncertain(config, x), backend=backend)
        loss = loss - config["entropy_coef"] * bonus
    near(loss, arrays(family, case)["loss"], "loss")
    near(torch.autograd.grad(loss, logp)[0], arrays(family, case)["grad_logp"], "gradient")
    for name, recorded in entry.get("metrics", {}).items():
        assert trl_clipped(TRL_CLIP[name], config, x, logp, reported[0], backend) == pytest.approx(recorded, abs=1e-6)


TRL_CLIP = {"clip_ratio/low_mean": "clip_low", "clip_ratio/high_mean": "clip_high", "cispo_clip_ratio": "clip_high"}


def trl_clipped(name, config, x, logp, metrics, backend):
    """The fraction as TRL counts it: of tokens, at sequence level of rows (masked ones too); in CISPO where A > 0."""
    objective, counts = trl_objective(config), x["mask"]
    if config["loss_type"] == "cispo":
        counts = counts & (x["advantages"] > 0)[:, None]
    elif config["importance_sampling_level"] != "sequence":
        return getattr(metrics, name)
    per_row = config["importance_sampling_level"] == "sequence"
    total = len(counts) if per_row else int(x["mask"].sum())
    clipped = 0.0
    for row in counts.any(1).nonzero().flatten().tolist() if per_row else [slice(None)]:
        at = slice(row, row + 1) if per_row else row
        old_logp = x["old_logp"][at] if "old_logp" in x else None
        _, found = tokenrl.policy_loss(
            objective, logp.detach()[at], old_logp, x["advantages"][at], mask=counts[at], backend=backend
        )  # fmt: skip
        clipped += (getattr(found, name) if found.tokens else 0.0) * (1 if per_row else found.tokens)
    return clipped / total


def test_every_family_has_its_test():
    vocabulary = ("primitives_small", "primitives_medium", "trl_selective", "linear", "trl_chunked", "flash_attn")
    estimators = ("verl_advantages", "verl_rollout_correction", "tempo", "spo", "rto", "hapo")
    selections = ("bandpo_bounds", "gtpo", "tw_grpo", "sstoken", "rsr")
    forms = (
        "gmpo_official", "trl_gmpo", "verl_geo_mean", "fiberpo", "cppo_unirl", "verl_clip_cov", "verl_kl_cov",
        "vespo_official", "swift_grpo",
    )  # fmt: skip
    trainers = ("nemo_rl_loss", "prime_rl_loss", "slime_loss", "miles_loss", "torchtitan_loss")  # tests/integrations
    distillation = (
        "divergences", "trl_gkd", "adakd_divergences", "adakd", "aligndistil", "linear_jsd", "topk_kl", "trl_iw_opd",
        "trl_minillm", "trl_sdpo", "nemo_rl_xtoken",
    )  # fmt: skip
    preference = (
        "trl_dpo", "trl_cpo_simpo", "trl_orpo", "trl_kto", "trl_tpo", "tdpo", "tgdpo", "cdpo", "sparsepo", "tabpo",
        "mahdpo",
    )  # fmt: skip
    elsewhere = (*DETACHED, *vocabulary, *estimators, *selections, *forms, *trainers, *distillation, *preference)
    assert {*VERL, *TRL, *elsewhere, "verl_agg_loss", "verl_kl_penalty"} == set(INDEX)
