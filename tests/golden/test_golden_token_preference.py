"""Preference losses that look at tokens, against outputs of their authors' code (tests/golden), value and gradient."""

import pytest
import torch
from golden_data import near
from golden_preference import alike, cases, read, shifted, spoiled

import tokenrl
from tokenrl import preference_weights


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
    """Gradients to the masks too, of their l1 norms as well."""
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
            loss = loss + factor * preference_weights.sparsepo_l1(spoiled(weight, mask), mask=mask)
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
