"""Objectives with a form, HAPO, DPPO with a given divergence, VESPO, ms-swift: against official outputs, in fp64."""

import math

import pytest
import torch
from golden_data import INDEX, arrays, near
from golden_losses import grid, leaf, weight

import tokenrl
from tokenrl import corrections
from tokenrl.objectives.gates.base import INF as OFF
from tokenrl.objectives.gates.weighted import Vespo


def some(family, *prefixes):
    """The grid of the cases whose names begin with one of the prefixes."""
    return [p for p in grid(family) if p.values[1].split(".", 1)[-1].startswith(prefixes)]


def compare(family, case, loss, logp):
    near(loss, arrays(family, case)["loss"], "loss")
    near(torch.autograd.grad(loss, logp)[0], arrays(family, case)["grad_logp"], "gradient")


GMPO = {
    "gmpo": {}, "gmpo_without_norm": {"statistic": "span_sum"}, "hmpo": {},
}  # fmt: skip


@pytest.mark.parametrize("family,case,backend", grid("gmpo_official"))
def test_gmpo_and_hmpo(family, case, backend):
    config = INDEX[family]["cases"][case]["config"]
    if config["mode"] == "gmpo_seqclip":
        pytest.skip("gmpo_seqclip clips the sum of the log ratios, not the token's: an ablation of the authors' code")
    x, logp = leaf(arrays(family, case), backend)
    row = tokenrl.objective(
        "hmpo" if config["mode"] == "hmpo" else "gmpo", eps_low=config["cliprange"], eps_high=config["cliprange"],
        **GMPO[config["mode"]],
    )  # fmt: skip
    rows = x["mask"].shape[0]  # a mean over all rows
    loss, _ = tokenrl.policy_loss(
        row, logp, x["old_logp"], x["advantages"], mask=x["mask"], normalizer=rows, backend=backend
    )
    compare(family, case, loss, logp)


@pytest.mark.parametrize("family,case,backend", grid("trl_gmpo"))
def test_trl_gmpo(family, case, backend):
    config = INDEX[family]["cases"][case]["config"]
    x, logp = leaf(arrays(family, case), backend)
    kept = x["mask"] & x["entropy_mask"].bool() if "entropy_mask" in x else x["mask"]
    row = tokenrl.objective("gmpo", eps_low=config["epsilon_low"], eps_high=config["epsilon_high"])
    how = {"normalizer": x["mask"].shape[0] * config["grad_accum"], "backend": backend}
    loss, _ = tokenrl.policy_loss(row, logp, x["old_logp"], x["advantages"], mask=kept, **how)
    # To TRL the ratio of a row without tokens is 1; here such a row pays nothing.
    loss = loss - x["advantages"][~kept.any(1)].sum() / how["normalizer"]
    if config["beta"]:
        kl = tokenrl.objective("kl_k3", aggregation="seq-mean-token-mean", clamp=OFF)
        loss = loss + config["beta"] * tokenrl.policy_loss(kl, logp, x["ref_logp"], None, mask=x["mask"], **how)[0]
    compare(family, case, loss, logp)


@pytest.mark.parametrize("family,case,backend", grid("verl_geo_mean"))
def test_verl_geo_mean(family, case, backend):
    config = INDEX[family]["cases"][case]["config"]
    x, logp = leaf(arrays(family, case), backend)
    mask, advantages, n = x["mask"], x["advantages"], x["mask"].sum(1)
    if advantages.dim() == 2:
        advantages = torch.where(mask, advantages, 0).sum(1) / n.clamp(min=1)
    token_weight = None
    if "is_weights" in x:  # the row's geometric mean
        logs = torch.where(mask, (x["is_weights"] + 1e-10).log(), 0).sum(1) / n.clamp(min=1)
        token_weight = logs.exp()[:, None].expand_as(logp)
    bounds = {"eps_low": config["clip_ratio_low"], "eps_high": config["clip_ratio_high"]}
    loss, _ = tokenrl.policy_loss(
        tokenrl.objective("gmpo", **bounds), logp, x["old_logp"], advantages, mask=mask, token_weight=token_weight,
        normalizer=mask.shape[0], backend=backend,
    )  # fmt: skip
    compare(family, case, loss, logp)


@pytest.mark.parametrize("family,case,backend", grid("fiberpo"))
def test_fiberpo(family, case, backend):
    config = INDEX[family]["cases"][case]["config"]
    x, logp = leaf(arrays(family, case), backend)
    row = tokenrl.objective("fiberpo", c_pos=config["C_pos"], c_neg=config["C_neg"], eps=config["eps"])
    loss, metrics = tokenrl.policy_loss(row, logp, x["old_logp"], x["advantages"], mask=x["mask"], backend=backend)
    compare(family, case, loss, logp)
    mean = arrays(family, case)["g_ratio"][x["mask"].cpu()].mean()
    assert metrics.ratio_mean == pytest.approx(mean.item(), rel=1e-9)


@pytest.mark.parametrize("family,case,backend", grid("cppo_unirl"))
def test_cppo(family, case, backend):
    entry = INDEX[family]["cases"][case]
    config = {key: entry["config"][key] for key in ("delta", "delta_b", "w_min")}
    x, logp = leaf(arrays(family, case), backend)
    row = tokenrl.objective("cppo", **config)
    loss, metrics = tokenrl.policy_loss(row, logp, x["old_logp"], x["advantages"], mask=x["mask"], backend=backend)
    compare(family, case, loss, logp)
    dropped = metrics.clip_low + metrics.clip_high
    assert dropped == pytest.approx(entry["metrics"]["masked_fraction"], abs=1e-6)


@pytest.mark.parametrize("family,case,backend", grid("verl_clip_cov"))
def test_clip_cov(family, case, backend):
    config = INDEX[family]["cases"][case]["config"]
    x, logp = leaf(arrays(family, case), backend)
    bounds = {"eps_low": config["clip_ratio_low"], "eps_high": config["clip_ratio_high"]}
    how = {"mask": x["mask"], "aggregation": config["loss_agg_mode"], "backend": backend}
    row = tokenrl.objective(
        "clip_cov", **bounds, fraction=config["clip_cov_ratio"], low=config["clip_cov_lb"], high=config["clip_cov_ub"]
    )
    loss, metrics = tokenrl.policy_loss(row, logp, x["old_logp"], x["advantages"], token_weight=weight(x, logp), **how)
    clipped = metrics.clip_low + metrics.clip_high
    if case.endswith("random_pick"):
        kept = x["mask"] & (x["corr"] != 0)
        loss, plain = tokenrl.policy_loss(
            tokenrl.objective("ppo", **bounds, clamp=OFF), logp, x["old_logp"], x["advantages"],
            token_weight=kept.to(logp.dtype), **how,
        )  # fmt: skip
        # Another choice, of as many tokens.
        picked = (x["mask"] & (x["corr"] == 0)).sum().item() / plain.tokens
        assert picked > 0 and clipped - plain.clip_low - plain.clip_high == pytest.approx(picked)
    compare(family, case, loss, logp)


@pytest.mark.parametrize("family,case,backend", grid("verl_kl_cov"))
def test_kl_cov(family, case, backend):
    config = INDEX[family]["cases"][case]["config"]
    x, logp = leaf(arrays(family, case), backend)
    row = tokenrl.objective("kl_cov", fraction=config["kl_cov_ratio"], coef=config["ppo_kl_coef"])
    loss, _ = tokenrl.policy_loss(
        row, logp, x["old_logp"], x["advantages"], mask=x["mask"], token_weight=weight(x, logp),
        aggregation=config["loss_agg_mode"], backend=backend,
    )  # fmt: skip
    compare(family, case, loss, logp)


@pytest.mark.parametrize("family,case,backend", some("dppo_official", "dppo_topk"))
def test_dppo_top_k(family, case, backend):
    config = INDEX[family]["cases"][case]["config"]
    x, logp = leaf(arrays(family, case), backend)
    row = tokenrl.objective(
        "dppo_topk", eps_low=config["clip_ratio_low"], eps_high=config["clip_ratio_high"],
        ceiling=config["clip_ratio_c"],
        divergence=x["topk_tv" if "topk_tv" in x else "topk_kl"].to(logp.dtype),
    )  # fmt: skip
    mode, rows = config["loss_agg_mode"], None
    if mode == "seq-mean-token-sum-norm":  # of this snapshot: over T, not over the rows
        rows = x["mask"].shape[1]
    loss, _ = tokenrl.policy_loss(
        row, logp, x["rollout_logp"], x["advantages"], mask=x["mask"], aggregation=mode, normalizer=rows,
        backend=backend,
    )  # fmt: skip
    compare(family, case, loss, logp)


@pytest.mark.parametrize("family,case,backend", grid("vespo_official"))
def test_vespo_official(family, case, backend):
    config = INDEX[family]["cases"][case]["config"]
    x, logp = leaf(arrays(family, case), backend)
    old_logp, mask, given = x["old_logp"], x["mask"], {}
    if "is_weights" in x:
        weights = x["is_weights"].clamp(min=1e-8)
        given = {"rollout_logp": old_logp - weights.log(), "correction": {"bound": "none", "clamp": None}}
    advantages = x["advantages"][:, 0] if x["advantages"].dim() == 2 else x["advantages"]
    row = tokenrl.objective("vespo", **{name: config[name] for name in Vespo.names if name in config})
    loss, _ = tokenrl.policy_loss(
        row, logp, old_logp, advantages, mask=mask, aggregation=config["loss_agg_mode"], backend=backend, **given
    )
    compare(family, case, loss, logp)


@pytest.mark.parametrize("family,case,backend", [p for p in grid("hapo") if p.values[1].startswith("policy_loss")])
def test_hapo(family, case, backend):
    """h_hat is the published score, whose low side has the wrong sign."""
    entry = INDEX[family]["cases"][case]
    x, logp = leaf(arrays(family, case), backend)
    config = entry["config"]
    row = tokenrl.objective(
        "hapo", eps_low=config.get("cliprange_low", config["cliprange"]), dual=config["clip_ratio_c"],
        eps_high=config.get("cliprange_high", config["cliprange"]), score=x["h_hat"],
        alpha=config.get("clip_alpha", 1.0) * config["adaptive_clip"],
        beta=config.get("adv_beta", 1.0) * config["adaptive_advantage"],
    )  # fmt: skip
    loss, metrics = tokenrl.policy_loss(
        row, logp, x["old_logp"], x["advantages"], mask=x["mask"], aggregation=config["loss_agg_mode"],
        backend=backend,
    )  # fmt: skip
    compare(family, case, loss, logp)
    assert metrics.clip_dual == pytest.approx(entry["metrics"]["pg_clipfrac_lower"], abs=1e-6)


FIPO_RANGE = {True: lambda width: (1.0, 1 + width), False: lambda width: (1 - width, 1 + width)}


def swift_objective(config):
    bounds = {"eps_low": config["epsilon_low"], "eps_high": config["epsilon_high"]}
    kind = config["loss_type"]
    if kind == "cispo":
        return tokenrl.objective("cispo", eps_high=config["epsilon_high"], clamp=OFF)
    if kind == "sapo":
        return tokenrl.objective("sapo", tau_pos=config["tau_pos"], tau_neg=config["tau_neg"], clamp=OFF)
    if kind == "real":
        return tokenrl.objective("real", tau=config["real_tau"])
    level = {
        "token": {"statistic": "token", "flow": "through"},
        "sequence": {"statistic": "span_mean", "flow": "through"},
        "sequence_token": {"statistic": "span_mean", "flow": "local"},
    }[config["importance_sampling_level"]]
    dual = OFF if config["delta"] is None else config["delta"]
    if kind != "fipo":
        return tokenrl.objective("grpo", **bounds, dual=dual, clamp=OFF, **level)
    low, high = (0.0, OFF)
    if config["fipo_clip_range"] is not None:
        low, high = FIPO_RANGE[config["fipo_clip_high_only"]](config["fipo_clip_range"])
    return tokenrl.objective(
        "fipo", **bounds, dual=dual, half_life=config["fipo_decay_rate"], low=low, high=high, ceiling=dual,
        safety=config["fipo_safety_threshold"], holes="count",
    )  # fmt: skip


def swift_aggregation(config, mask):
    """(mode, normaliser)."""
    rows = mask.shape[0]
    return {
        "grpo": ("seq-mean-token-mean", rows), "sapo": ("seq-mean-token-mean", rows), "bnpo": ("token-mean", None),
        "dapo": ("token-mean", config.get("num_items_in_batch")),
        "cispo": ("token-mean", config.get("num_items_in_batch")),
        "fipo": ("token-mean", config.get("num_items_in_batch")),
        "dr_grpo": ("token-mean", rows * config.get("max_completion_length", 0)),
        "real": ("group-mean", rows // config.get("num_generations", 1)),
    }[config["loss_type"]]  # fmt: skip


def swift_weights(config, x):
    """The factors of the loss: rollout correction and the entropy quantile."""
    factors, mask = [], x["mask"]
    if config["rollout_mode"] in ("token_truncate", "sequence_mask"):
        assert torch.equal(x["is_weights"], torch.where(mask, x["is_weights"], 0))
        high = config["rollout_threshold"]
        if config["rollout_mode"] == "token_truncate":
            how = {"bound": "truncate", "high": high}
            factors.append(corrections.importance_weights(x["old_logp"], x["rollout_logp"], mask=mask, **how))
        else:
            plain = corrections.importance_weights(x["old_logp"], x["rollout_logp"], mask=mask, bound="none")
            geometric = corrections.importance_weights(
                x["old_logp"], x["rollout_logp"], mask=mask, level="geometric", bound="none"
            )
            factors.append(plain * (geometric <= high))
        near(factors[-1], x["is_weights"].cpu(), "weights")
    if config["top_entropy_quantile"] < 1:
        factors.append(corrections.top_entropy_mask(x["entropy"], quantile=config["top_entropy_quantile"], mask=mask))
    return math.prod(f.to(x["old_logp"].dtype) for f in factors) if factors else None


@pytest.mark.parametrize("family,case,backend", grid("swift_grpo"))
def test_swift(family, case, backend):
    config = INDEX[family]["cases"][case]["config"]
    x, logp = leaf(arrays(family, case), backend)
    if config["off_policy_delta"] is not None:  # its rows leave the count too
        x["mask"] &= corrections.off_policy_sequence_mask(
            logp.detach(), x["rollout_logp"], x["advantages"], mask=x["mask"], threshold=config["off_policy_delta"]
        )
    mode, normalizer = swift_aggregation(config, x["mask"])
    how = {"mask": x["mask"], "aggregation": mode, "normalizer": normalizer, "backend": backend}
    if mode == "group-mean":
        how["group_ids"] = torch.arange(logp.shape[0], device=logp.device) // config["num_generations"]
    factors = swift_weights(config, x)
    entropy_only = config["top_entropy_quantile"] < 1
    loss, _ = tokenrl.policy_loss(
        swift_objective(config), logp, x["old_logp"], x["advantages"], token_weight=factors, **how
    )
    if config["beta"]:
        kl = tokenrl.objective("kl_k3", ceiling=10.0)
        if mode == "group-mean":
            how = {"mask": x["mask"], "aggregation": "token-mean", "backend": backend}
        penalty, _ = tokenrl.policy_loss(
            kl, logp, x["ref_logp"], None, token_weight=None if entropy_only else factors, **how
        )
        loss = loss + config["beta"] * penalty
    compare(family, case, loss, logp)
