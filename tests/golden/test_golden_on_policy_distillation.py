"""On-policy distillation by sampled tokens against outputs of TRL (tests/golden)."""

import pytest
import torch
from golden_data import INDEX, arrays, near

import tokenrl
from tokenrl.methods import on_policy_distillation as opd


def sampled(logits, ids, temperature=1.0):
    """Log-probs of the ids, with a graph."""
    return tokenrl.token_logprobs(logits, ids, temperature=temperature, outputs=["logp"]).logp


@pytest.mark.parametrize("case", INDEX["trl_iw_opd"]["cases"])
def test_iw_opd(case):
    x, config = arrays("trl_iw_opd", case), INDEX["trl_iw_opd"]["cases"][case]["config"]
    mask, logits = x["labels"] != -100, x["student_logits"].requires_grad_()
    logp = sampled(logits, x["completion_ids"], config["temperature"])
    rollout = x.get("rollout_logps", logp.detach())
    how = {"gamma": config["gamma"], "eps": config["epsilon"], "mask": mask}
    advantages = opd.iw_opd_advantages(rollout, x["teacher_logps"], **how)
    loss, _ = tokenrl.policy_loss("reinforce", logp, None, advantages, mask=mask, normalizer=config["num_items"])
    near(loss, x["loss"], "loss")
    near(torch.autograd.grad(loss, logits)[0], x["grad_student_logits"], "gradient")
    near(advantages[mask].mean(), x["mean_advantage"], "advantage")
    weights = (advantages / opd.teacher_advantages(rollout, x["teacher_logps"], mask=mask))[mask]
    for name in ("mean", "min", "max"):
        near(getattr(weights, name)(), x[f"{name}_weight"], name)


@pytest.mark.parametrize("case", INDEX["trl_minillm"]["cases"])
def test_minillm(case):
    """As TRL computes it, with its gradient; where no cell is masked and the divisor cancels gamma^t, the method."""
    x, config = arrays("trl_minillm", case), INDEX["trl_minillm"]["cases"][case]["config"]
    mask, logp = x["mask"], x["student_logps"].requires_grad_()
    how = {"gamma": config["gamma"], "normalize_length": config["length_normalization"]}
    found = opd.minillm_advantages(logp, x["teacher_logps"], mask=mask, compat="trl", **how)
    near(found, x["advantage"], "advantage")
    near(torch.autograd.grad((x["upstream"] * found).sum(), logp)[0], x["grad_student_logps"], "gradient")
    ours = opd.minillm_advantages(logp.detach(), x["teacher_logps"], mask=mask, **how)
    if not config["length_normalization"]:
        near((ours * config["gamma"] ** torch.arange(mask.shape[1]).double())[mask], found[mask], "advantage")
    logits = x["student_logits"].requires_grad_()
    loss, _ = tokenrl.distillation_loss("reverse_kd", logits, x["teacher_logits"], mask=mask)
    near(loss, x["single_step_loss"], "single step")
    near(torch.autograd.grad(loss, logits)[0], x["grad_student_logits"], "gradient of the single step")


FULL = {1.0: "reverse_kd", 0.0: "forward_kd", 0.5: "gkd"}


@pytest.mark.parametrize("case", [c for c in INDEX["trl_sdpo"]["cases"] if "topk" not in c])
def test_sdpo(case):
    x, config = arrays("trl_sdpo", case), INDEX["trl_sdpo"]["cases"][case]["config"]
    mask, logits = x["loss_mask"].bool(), x["student_logits"].requires_grad_()
    logp = sampled(logits, x["completion_ids"])
    how = {"mask": mask, "aggregation": "seq-mean-token-mean"}
    if config["is_clip"] is not None:
        how["token_weight"] = tokenrl.corrections.importance_weights(
            logp.detach(), x["old_logps"], mask=mask, high=config["is_clip"]
        )
    if config["mode"] == "full_logits":
        loss, _ = tokenrl.distillation_loss(FULL[config["alpha"]], logits, x["teacher_logits"], **how)
    else:
        advantages = opd.teacher_advantages(logp.detach(), sampled(x["teacher_logits"], x["completion_ids"]), mask=mask)
        loss, _ = tokenrl.policy_loss("reinforce", logp, None, advantages, **how)
    near(loss, x["loss"], "loss")
    near(torch.autograd.grad(loss, logits)[0], x["grad_student_logits"], "gradient")
