"""Preference losses against outputs of TRL (tests/golden), value and gradient."""

import torch
from golden_data import near
from golden_preference import alike, cases, read, shifted, spoiled

import tokenrl
from tokenrl import preference_weights

DPO = {
    "sigmoid": "dpo", "ipo": "ipo", "hinge": "dpo_hinge", "robust": "dpo_robust", "sigmoid_norm": "dpo_norm",
    "exo_pair": "exo", "nca_pair": "nca", "bco_pair": "bco", "sppo_hard": "sppo", "apo_zero": "apo_zero",
    "apo_down": "apo_down", "discopop": "discopop", "aot": "aot", "aot_unpaired": "aot_unpaired", "sft": "dpo",
    "forward_kl": "dpo_forward_kl", "js_divergence": "dpo_js", "alpha_divergence": "dpo_alpha",
}  # fmt: skip


@cases("trl_dpo")
def test_trls_dpo(case):
    x, config = read("trl_dpo", case)
    mask, logp = x["completion_mask"][:, 1:], x["logps"].requires_grad_()
    given = [spoiled(each, mask) for each in (logp, x["ref_logps"])]
    kind = config["f_divergence_type"]
    row = DPO[kind if kind != "reverse_kl" else config["loss_types"][0]]
    parameters = {"beta": config["beta"]}
    if kind == "alpha_divergence":
        parameters["alpha"] = config["f_alpha_divergence_coef"]
    if "label_smoothing" in tokenrl.preference(row).link.names and kind == "reverse_kl" and row != "dpo":
        parameters["label_smoothing"] = config["label_smoothing"]
    share = config["loss_weights"][0]
    if "sft" in config["loss_types"]:
        parameters["nll"] = config["loss_weights"][-1] / share
    more = {}
    if config["use_weighting"]:
        more["pair_weight"] = preference_weights.wpo_weights(given[0], spoiled(x["log_sum_sq_probs"], mask), mask=mask)
    if config["ld_alpha"] is not None:
        more["token_weight"] = preference_weights.ld_dpo_weights(logp, alpha=config["ld_alpha"], mask=mask)
    loss, metrics = tokenrl.preference_loss(tokenrl.preference(row, **parameters), *given, mask=mask, **more)
    if case == "sft":
        loss = loss - tokenrl.preference_loss(tokenrl.preference(row, beta=config["beta"]), *given, mask=mask)[0]
    rtol = {"alpha_divergence": 2e-6, "exo_pair": 1e-7}.get(case, 1e-9)  # TRL's is in fp32, or its label smoothing
    alike(share * loss, x, logp, mask, rtol)
    # Of means our rewards are means, TRL's are sums.
    counts = mask.sum(1) if row in ("ipo", "dpo_norm") else torch.ones(len(mask))
    for side, rewards in zip(("chosen", "rejected"), (metrics.chosen_rewards, metrics.rejected_rewards), strict=True):
        count = counts[: len(rewards)] if side == "chosen" else counts[len(rewards) :]
        near((rewards * count).mean(), x[f"mean_{side}_reward"], side, rtol)
    if row not in ("ipo", "dpo_norm"):
        near(metrics.accuracy, x["reward_accuracy"], "accuracy", 1e-7)
    near(metrics.margins, metrics.chosen_rewards - metrics.rejected_rewards, "margins")


def chosen_and_rejected(x, name, fill):
    """[2P, T] of the two, which TRL pads apart."""
    chosen, rejected = x[f"chosen_{name}"], x[f"rejected_{name}"]
    width = max(chosen.shape[1], rejected.shape[1])
    return torch.cat([torch.nn.functional.pad(y, (0, width - y.shape[1]), value=fill) for y in (chosen, rejected)])


CPO = {"sigmoid": "cpo", "hinge": "slic", "simpo": "simpo", "ipo": "ipo"}


@cases("trl_cpo_simpo")
def test_trls_cpo(case):
    x, config = read("trl_cpo_simpo", case)
    logits = x["logits"].requires_grad_()
    logp, mask = shifted(logits, chosen_and_rejected(x, "labels", -100))
    row = "alphapo" if config["alphapo_alpha"] else CPO[config["loss_type"]]
    parameters = {"beta": config["beta"], "nll": config["cpo_alpha"], "reference": "none"}
    if config["loss_type"] == "simpo":
        parameters["gamma"] = config["simpo_gamma"]
    if config["alphapo_alpha"]:
        parameters["alpha"] = config["alphapo_alpha"]
    loss, metrics = tokenrl.preference_loss(tokenrl.preference(row, **parameters), logp, mask=mask)
    alike(loss, x, logits)
    near(metrics.chosen_rewards.mean() / config["beta"], x["mean_logp_chosen"], "chosen")
    near(metrics.rejected_rewards.mean() / config["beta"], x["mean_logp_rejected"], "rejected")


@cases("trl_orpo")
def test_trls_orpo(case):
    """Its NLL is that of the prompt too."""
    x, config = read("trl_orpo", case)
    logits = x["logits"].requires_grad_()
    _, mask = shifted(logits, chosen_and_rejected(x, "labels", -100))
    logp, _ = shifted(logits, chosen_and_rejected(x, "input_ids", 0))
    attended = chosen_and_rejected(x, "attention_mask", 0)[:, 1:].bool()
    attended[len(attended) // 2 :] = False
    row = tokenrl.preference("orpo", beta=config["beta"])
    loss, metrics = tokenrl.preference_loss(row, logp, mask=mask, nll_mask=attended)
    alike(loss, x, logits)
    near(metrics.chosen_rewards.mean() / config["beta"], x["mean_logp_chosen"], "chosen")


@cases("trl_tpo")
def test_trls_tpo(case):
    """Its NLL is that of a third answer."""
    x, config = read("trl_tpo", case)
    logits, mask = x["logits"].requires_grad_(), x["completion_mask"]
    logp, mask = shifted(logits, torch.where(mask, x["input_ids"], -100))
    number = len(mask) // 3
    pairs = torch.arange(2 * number).view(2, number).t()
    gold = mask.clone()
    gold[: 2 * number] = False
    parameters = {"beta": config["beta"], "nll": config["tpo_alpha"]}
    if case == "tpo_l":
        parameters["gamma"] = config["tpo_l_gamma"]
    row = tokenrl.preference("tpo_l" if case == "tpo_l" else "tpo", **parameters)
    loss, _ = tokenrl.preference_loss(row, logp, mask=mask, pairs=pairs, nll_mask=gold)
    alike(loss, x, logits)


@cases("trl_kto")
def test_trls_kto(case):
    """The batch's KL made of log ratios, and given."""
    x, config = read("trl_kto", case)
    mask, logp = x["completion_mask"][:, 1:], x["logps"].requires_grad_()
    weights = {name: config[name] for name in ("desirable_weight", "undesirable_weight")}
    row = tokenrl.preference(config["loss_type"], beta=config["beta"], **weights)
    made = x["kl_logps"] - x["kl_ref_logps"] if "kl_logps" in x else None
    for kl in (made,) if made is None else (made, x["kl"], x["kl"].item()):
        loss, metrics = tokenrl.preference_loss(
            row, spoiled(logp, mask), x["ref_logps"], mask=mask, desirable=x["label"], kl=kl
        )
        alike(loss, x, logp, mask)
    rewards = config["beta"] * (logp - x["ref_logps"]).detach().sum(1)
    near(metrics.chosen_rewards[x["label"]], rewards[x["label"]], "rewards")
    near(metrics.rejected_rewards[~x["label"]], rewards[~x["label"]], "rewards")
