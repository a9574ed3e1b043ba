"""Divergences over K ids against outputs of TRL, ms-swift, NeMo-RL and verl-recipe (tests/golden)."""

import pytest
import torch
from golden_data import INDEX, arrays, near

import tokenrl

TOPK = INDEX["topk_kl"]["cases"]


def of(trainer):
    return [(case, TOPK[case]["config"]) for case in TOPK if case.startswith(trainer)]


def logps(ids, *logits, **how):
    return [tokenrl.token_logprobs(x, ids, outputs=["logp"], **how).logp for x in logits]


def row(beta):
    return {0.0: "forward_kd", 1.0: "reverse_kd"}.get(beta) or tokenrl.distillation("gkd", beta=beta)


def same(loss, x, logits):
    near(loss, x["loss"], "loss")
    near(torch.autograd.grad(loss, logits)[0], x["grad_student_logits"], "gradient")


@pytest.mark.parametrize("case,config", of("trl"))
def test_trl(case, config):
    x, beta = arrays("topk_kl", case), config["beta"]
    logits, teacher = x["student_logits"].requires_grad_(), x["teacher_logits"]
    lists = [tokenrl.topk_ids(t, config.get("top_k", 1)) for t in (teacher, logits)]
    if config.get("mode") == "sampled":
        lists[1] = x["completion_ids"][..., None]
    ids, topk_mask = tokenrl.union_topk_ids(*lists) if 0 < beta < 1 else (lists[int(beta)], None)
    loss, _ = tokenrl.topk_distillation_loss(
        row(beta), *logps(ids, logits, teacher), rest="tail" if config["add_tail"] else "renormalised",
        topk_mask=topk_mask, mask=x["labels"] != -100,
    )  # fmt: skip
    same(loss, x, logits)


@pytest.mark.parametrize("case", [c for c in INDEX["trl_sdpo"]["cases"] if "topk" in c])
def test_sdpo(case):
    x, config = arrays("trl_sdpo", case), INDEX["trl_sdpo"]["cases"][case]["config"]
    logits = x["student_logits"].requires_grad_()
    lists = logps(tokenrl.topk_ids(logits, config["topk"]), logits, x["teacher_logits"])
    loss, values = tokenrl.topk_distillation_loss(
        row(config["alpha"]), *lists, rest="tail" if config["add_tail"] else "renormalised",
        mask=x["loss_mask"].bool(), aggregation="seq-mean-token-mean",
    )  # fmt: skip
    same(loss, x, logits)
    near(values, x["token_loss_before_clip"] * x["loss_mask"], "per token")


@pytest.mark.parametrize("case,config", of("swift"))
def test_ms_swift(case, config):
    x = arrays("topk_kl", case)
    logits, mask = x["student_logits"].requires_grad_(), x["labels"] != -100
    (logp,) = logps(x["teacher_topk_indices"], logits, temperature=config["temperature"])
    other = x["teacher_topk_logits"] / config["temperature"]
    assert mask.sum() == x["num_valid"]
    how = {"rest": "renormalised", "mask": mask, "aggregation": "token-sum"}
    loss, _ = tokenrl.topk_distillation_loss(row(config["beta"]), logp, other, **how)
    same(loss, x | {"loss": x["total"]}, logits)


SHARES = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "mixed": (0.5, 0.5)}


@pytest.mark.parametrize("case,config", of("nemo"))
def test_nemo_rl(case, config):
    """Its mixed KL is half of each; it drops the last position and shifts the mask by one."""
    x = arrays("topk_kl", case)
    logits, mask = x["student_logits"].requires_grad_(), x["token_mask"][:, 1:].bool()
    ids, other = x["teacher_topk_indices"][:, :-1], x["teacher_topk_logits"][:, :-1]
    stats = tokenrl.token_logprobs(logits[:, :-1], ids, outputs=["logp", "entropy"])
    rest, loss = "zero_outside" if config["zero_outside_topk"] else "renormalised", 0
    for kind, share in zip(("forward_kl", "reverse_kl"), SHARES[config["kl_type"]], strict=True):
        entropy = {"entropy": stats.entropy} if (rest, kind) == ("zero_outside", "reverse_kl") else {}
        values = tokenrl.topk_token_divergence(stats.logp, other, kind, rest=rest, row_mask=mask, **entropy)
        loss = loss + share * values.sum() / (mask.double().sum() + 1e-8)
    same(loss, x, logits)


@pytest.mark.parametrize("case,config", of("verl"))
def test_verl_recipe(case, config):
    """The gradient is that of its value, not the one that its backward returns."""
    x = arrays("topk_kl", case)
    logits = x["student_logits"].requires_grad_()
    values = tokenrl.topk_token_divergence(
        *logps(x["teacher_topk_indices"], logits), x["teacher_topk_logps"], rest="truncated"
    )
    near(values, x["token_kl"], "value")
    found = torch.autograd.grad((x["upstream"] * values).sum(), logits)[0]
    near(found, x["grad_exact"], "gradient")
    assert (found - x["grad_released"]).abs().max() > 1e-3
