"""Preference losses against outputs of TRL and of the methods' authors (tests/golden), value and gradient."""

import pytest
import torch
from golden_data import INDEX, arrays, near

import tokenrl
from tokenrl import preference_weights


def cases(family, *left_out):
    return pytest.mark.parametrize("case", [case for case in INDEX[family]["cases"] if case not in left_out])


def read(family, case):
    return arrays(family, case), INDEX[family]["cases"][case]["config"]


def alike(loss, x, leaf, mask=None, rtol=1e-9):
    """leaf: the logits; or the log-probs, whose masked cells the code sums as the zeros that they hold there, so that
    what it records as their gradient is none."""
    near(loss, x["loss"], "loss", rtol)
    expected = x["grad_logits"] if mask is None else torch.where(mask, x["grad_logps"], 0)
    near(torch.autograd.grad(loss, leaf)[0], expected, "gradient", rtol)


def spoiled(x, mask):
    """Masked cells may hold anything."""
    return torch.where(mask, x, torch.nan)


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


def shifted(logits, labels):
    """(log-probs of the labels, their mask), of logits at position t that predict label t + 1."""
    labels = labels[:, 1:]
    mask = labels != -100
    return tokenrl.token_logprobs(logits[:, :-1], labels.clamp(min=0), outputs=["logp"]).logp, mask


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


def valid_labels(x):
    labels = x["labels"]
    return labels[:, 1:].clamp(min=0), labels[:, 1:] != -100


@cases("tdpo")
def test_tdpo(case):
    """From logits, with the divergence per token by token_divergence."""
    x, config = read("tdpo", case)
    logits = x["logits"].requires_grad_()
    ids, mask = valid_labels(x)
    logp, ref_logp = (tokenrl.token_logprobs(z[:, :-1], ids, outputs=["logp"]).logp for z in (logits, x["ref_logits"]))
    divergence = tokenrl.token_divergence(logits[:, :-1], x["ref_logits"][:, :-1], "forward_kl", row_mask=mask)
    parameters = {"divergence": config["alpha"]} if config["if_tdpo2"] else {}
    row = tokenrl.preference("tdpo2" if config["if_tdpo2"] else "tdpo1", beta=config["beta"], **parameters)
    loss, metrics = tokenrl.preference_loss(row, logp, ref_logp, mask=mask, divergence=divergence)
    alike(loss, x, logits)
    near(metrics.chosen_rewards, x["chosen_rewards"], "chosen")
    near(metrics.rejected_rewards, x["rejected_rewards"], "rejected")
    given = [spoiled(x[name], mask).requires_grad_() for name in ("token_logp", "token_kl")]
    loss, _ = tokenrl.preference_loss(row, given[0], x["token_logp_ref"], mask=mask, divergence=given[1])
    for found, name in zip(torch.autograd.grad(loss, given), ("grad_margin", "grad_seq_kl"), strict=True):
        near(found, torch.where(mask, x[name][:, None], 0), name)


@cases("tgdpo")
def test_tgdpo(case):
    x, config = read("tgdpo", case)
    _, mask = valid_labels(x)
    logp = x["logps"].requires_grad_()
    weight = preference_weights.tgdpo_weights(
        spoiled(x["logps_hat"], mask), x["logps_ref"], beta=config["beta"], alpha=config["alpha"], mask=mask
    )
    row = tokenrl.preference("dpo", beta=config["beta"])
    loss, _ = tokenrl.preference_loss(row, logp, x["logps_ref"], mask=mask, token_weight=weight)
    alike(loss, x, logp, mask)


@cases("cdpo", "score_small", "score_v211")
def test_cdpo_as_released(case):
    """Which compares position by position: every token is a sequence, padding too."""
    x, config = read("cdpo", case)
    logp, ref_logp, mask = x["logps"].requires_grad_(), x["logps_ref"], x["mask"]
    weight = torch.cat([x["chosen_weight"], x["rejected_weight"]])
    row = tokenrl.preference("dpo", beta=config["beta"], label_smoothing=config["label_smoothing"])
    flat = (spoiled(logp, mask).flatten(), ref_logp.flatten())
    loss, _ = tokenrl.preference_loss(
        row, *flat, mask=mask.flatten(), cu_seqlens=torch.arange(mask.numel() + 1), token_weight=weight.flatten()
    )
    alike(loss, x, logp, mask)
    score = torch.cat([x["chosen_weight"], 1 - x["rejected_weight"]])
    made = preference_weights.cdpo_weights(score, chosen="one" if config["only_neg"] else "score", mask=mask)
    near(made, torch.where(mask, weight, 0), "weight")
    loss, _ = tokenrl.preference_loss(row, logp, ref_logp, mask=mask, token_weight=made)
    margin = (torch.where(mask, weight * (logp - ref_logp), 0).sum(1).view(2, -1) * config["beta"]).diff(dim=0)[0]
    e, log_sigma = config["label_smoothing"], torch.nn.functional.logsigmoid
    by_hand = -((1 - e) * log_sigma(-margin) + e * log_sigma(margin)).mean()
    near(loss, by_hand.detach(), "loss by the paper")
    near(torch.autograd.grad(loss, logp)[0], torch.autograd.grad(by_hand, logp)[0], "gradient by the paper")


@pytest.mark.parametrize("case", ["score_small", "score_v211"])
def test_cdpos_score(case):
    x, _ = read("cdpo", case)
    logits = (2 * x["pos_logits"] - x["neg_logits"])[:, :-1]
    found = tokenrl.token_logprobs(logits, x["input_ids"][None, 1:], outputs=["logp"]).logp.exp()
    near(found[0], x["cd_prob"], "score")


def both(x, name):
    return torch.cat([x[name.format("chosen")], x[name.format("rejected")]])


@cases("sparsepo", "mapo_a", "mapo_b", "zn_a")
def test_sparsepo(case):
    """Gradients to the masks too; the l1 norm of the masks is the caller's to add."""
    x, config = read("sparsepo", case)
    logits, ref_logits = both(x, "{}_logits").requires_grad_(), both(x, "ref_{}_logits")
    ids, mask = both(x, "{}_labels"), both(x, "{}_loss_mask")
    logp, ref_logp = (tokenrl.token_logprobs(z, ids, outputs=["logp"]).logp for z in (logits, ref_logits))
    divergence = tokenrl.token_divergence(logits, ref_logits, row_mask=mask)
    kept = both(x, "rw_mask_{}").requires_grad_()
    kl_kept = kept if config["common_mask"] else None
    if config["mask_on_kl"] and not config["common_mask"]:
        kl_kept = both(x, "kl_mask_{}").requires_grad_()
    loss, _ = tokenrl.preference_loss(
        tokenrl.preference("sparsepo", beta=config["beta"]), logp, ref_logp, mask=mask, divergence=divergence,
        token_weight=kept, divergence_weight=kl_kept,
    )  # fmt: skip
    for factor, weight in ((config["l1_u"], kept), (config["l1_d"], kl_kept)):
        if weight is not None:
            loss = loss + factor * torch.where(mask, weight, 0).abs().sum() / (len(mask) / 2)
    near(loss, x["loss"], "loss")
    leaves = {"logits": logits, "rw_mask": kept}
    if kl_kept is not None and kl_kept is not kept:
        leaves["kl_mask"] = kl_kept
    for name, found in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        near(found, both(x, "grad_{}_logits" if name == "logits" else f"grad_{name}_{{}}"), name)


@pytest.mark.parametrize("case", ["mapo_a", "mapo_b"])
def test_mapo(case):
    x, config = read("sparsepo", case)
    logp, kl = both(x, "{}_logps").requires_grad_(), both(x, "{}_neg_kl").requires_grad_()
    weight = both(x, "{}_mask")
    row = tokenrl.preference("sparsepo", beta=config["beta"])
    loss, _ = tokenrl.preference_loss(
        row, logp, both(x, "ref_{}_logps"), divergence=-kl, token_weight=weight, divergence_weight=weight
    )
    near(loss, x["loss"], "loss")
    for name, found in zip(("logps", "neg_kl"), torch.autograd.grad(loss, (logp, kl)), strict=True):
        near(found, both(x, f"grad_{{}}_{name}"), name)


def test_mapos_weights():
    x, _ = read("sparsepo", "zn_a")
    activation = torch.where(x["loss_mask"][..., None], x["activation"], torch.nan)
    found = preference_weights.mapo_weights(activation, mask=x["loss_mask"])
    near(found, x["mask_wide"][..., 0], "weight")
    flat = preference_weights.mapo_weights(torch.ones_like(activation), mask=x["loss_mask"])
    assert not flat.any()  # no token of a sequence stands out


@cases("mahdpo")
def test_mah_dpo(case):
    """The logits of each pair are those of its head."""
    x, config = read("mahdpo", case)
    head = x["dimension"].repeat(2)
    everyone, (ids, mask) = torch.arange(len(head)), valid_labels(x)
    if case == "linear_heads":
        leaves = {name: x[name].requires_grad_() for name in ("hidden", "heads")}
        x["ref_logits"] = torch.einsum("btd,kvd->kbtv", x["ref_hidden"], x["ref_heads"])
        logits = torch.einsum("btd,kvd->kbtv", *leaves.values())
    else:
        leaves = {"logits": x["logits"].requires_grad_()}
        logits = x["logits"]
    logp, ref_logp = (
        tokenrl.token_logprobs(z[head, everyone][:, :-1], ids, outputs=["logp"]).logp for z in (logits, x["ref_logits"])
    )
    weight = preference_weights.mah_dpo_weights(x["dimension"], config["heads"])
    dpo = config["loss"] == "dpo"
    name, smoothing = ("dpo", {"label_smoothing": config["label_smoothing"]}) if dpo else ("ipo_sum", {})
    row = tokenrl.preference(name, beta=config["beta"], **smoothing)
    loss, _ = tokenrl.preference_loss(row, logp, ref_logp, mask=mask, pair_weight=weight)
    near(loss, x["loss"], "loss")
    for name, found in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        near(found, x[f"grad_{name}"], name)


@cases("tabpo")
def test_tab_po(case):
    """And their ablation, in which examples weigh."""
    x, config = read("tabpo", case)
    logits = both(x, "{}_logits").requires_grad_()
    labels, weight = both(x, "{}_labels"), both(x, "{}_weights")[:, 1:]
    logp, mask = shifted(logits, labels)
    ref_logp, _ = shifted(both(x, "ref_{}_logits"), labels)
    weight = preference_weights.tab_po_weights(spoiled(weight, mask), mask=mask)
    own = {}
    if config.get("enable_class_balance", False):
        own["pair_weight"] = x["example_weight"] / x["example_weight"].mean()
    row = tokenrl.preference("dpo_norm", beta=config["beta"])
    loss, _ = tokenrl.preference_loss(row, logp, ref_logp, mask=mask, token_weight=weight, **own)
    near(loss, x["loss_dpo"], "preference")
    per = "weight" if config["script"] == "main" else "token"
    how = {"tau": config["tau"], "per": per, "mask": mask} | own
    barrier = preference_weights.tab_po_barrier(spoiled(logp, mask), weight, **how)
    near(config["lam"] * barrier, x["loss_barrier"], "barrier")
    total = loss + config["lam"] * barrier
    near(total, x["loss"], "loss")
    near(torch.autograd.grad(total, logits)[0], both(x, "grad_{}_logits"), "gradient")
