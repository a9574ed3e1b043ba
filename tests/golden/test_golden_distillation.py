"""AlignDistil and AdaKD against outputs of their authors' code (tests/golden)."""

import pytest
import torch
from golden_data import INDEX, arrays, near

import tokenrl
from tokenrl.methods import adakd, aligndistil


def alike(loss, x, config, logits):
    near(config["kd_coef"] * loss, x["loss"], "loss")
    near(config["kd_coef"] * torch.autograd.grad(loss, logits)[0], x["grad_logits"], "gradient")


@pytest.mark.parametrize("case", INDEX["aligndistil"]["cases"])
def test_aligndistil(case):
    """From logits; and from hidden states, which the logits are where each head is the identity, one or two."""
    x, config = arrays("aligndistil", case), INDEX["aligndistil"]["cases"][case]["config"]
    mask, logits = x["labels"] != -100, x["logits"].requires_grad_()
    per = "mean" if config["reward_len_norm"] else "sum"
    how = {"mask": mask, "aggregation": f"seq-mean-token-{per}", "other_temperature": config["kd_temperature"]}
    how["temperature"] = config["kd_temperature"] if config["trainer"] == "on" else 1.0
    if config["type"] == "gkd":
        alike(tokenrl.distillation_loss("reverse_kd", logits, x["teacher_logits"], **how)[0], x, config, logits)
        return
    betas = {"beta": config["beta"], "beta2": config["beta2"], "mask": mask}
    teacher, coef = aligndistil.teacher_of(config["type"], x["teacher_logits"], x["reference_logits"], **betas)
    if "token_coef" in x:
        near(coef[mask], x["token_coef"][mask], "coef")
    loss, _ = tokenrl.distillation_loss("reverse_kd", logits, teacher, token_weight=coef, **how)
    alike(loss, x, config, logits)
    one = torch.eye(logits.shape[-1], dtype=logits.dtype)
    for second in (one, one.clone()):
        hidden, weight, found = aligndistil.linear_teacher_of(
            config["type"], x["teacher_logits"], one, x["reference_logits"], second, **betas
        )
        assert weight.shape[1] == one.shape[1] * (1 if second is one else 2)
        near(found, coef, "coef")
        loss, _ = tokenrl.linear_distillation_loss("reverse_kd", logits, one, hidden, weight, token_weight=coef, **how)
        alike(loss, x, config, logits)


ROWS = {"rkd": adakd.ADAKD, "fkd": tokenrl.distillation("kd"), "jsd": tokenrl.distillation("gkd", beta=0.1, power=2.0)}


@pytest.mark.parametrize("case", [case for case in INDEX["adakd"]["cases"] if "latf" not in case and case != "scores"])
def test_adakd(case):
    """The choice, the temperatures, and the loss with its gradient where both are constants."""
    x, config = arrays("adakd", case), INDEX["adakd"]["cases"][case]["config"]
    mask, logits = x["labels"] != -100, x["logits"].requires_grad_()
    if config["rule"] == "hellinger":
        score = adakd.difficulty(logits, x["teacher_logits"], mask=mask)
    else:
        score = tokenrl.token_divergence(logits.detach(), x["teacher_logits"], "reverse_kl", row_mask=mask)
    kept = adakd.focused(score, config["selection_ratio"], mask=mask)
    chosen = x["selected_indices"]
    assert sorted(chosen.tolist()) == kept.flatten().nonzero().flatten().tolist()
    how = {"base": config["temperature_base"], "scale": config["temperature_scale"]}
    temperature = adakd.focused_temperature(score, kept, soften=config["temperature_soften"], **how)
    near(temperature.flatten()[chosen], x["temperature"], "temperature")
    loss, _ = tokenrl.distillation_loss(
        ROWS[config["loss_fn"]], logits, x["teacher_logits"], mask=kept, temperature=temperature
    )
    near(loss, x["loss"], "loss", rtol=1e-7)
    near(torch.autograd.grad(loss, logits)[0], x["grad_logits_detached"], "gradient", rtol=1e-7)


def test_adakds_scores():
    x = arrays("adakd", "scores")
    mask = x["labels"] != -100
    found = adakd.difficulty(x["logits"], x["teacher_logits"], mask=mask)
    near(found[mask], x["score_hellinger"], "score")


@pytest.mark.parametrize("case", ["latf_a", "latf_b"])
def test_adakds_controller(case):
    x, config = arrays("adakd", case), INDEX["adakd"]["cases"][case]["config"]
    begin = int(config["warmup_fraction"] * config["total_iters"])
    how = {"tolerance": config["loss_ratio_eps"], "step": config["sample_ratio_eps"], "decay": config["ema_decay"]}
    latf = adakd.LossAdaptiveFocus(begin=begin, **how)
    for step, loss in enumerate(x["step_loss"].tolist()):
        if step == 50:  # as of a checkpoint
            state, latf = latf.state_dict(), adakd.LossAdaptiveFocus(begin=begin, **how)
            latf.load_state_dict(state)
        assert latf.update(loss) == pytest.approx(x["sample_ratio"][step].item(), rel=1e-12)
        assert latf.ema == pytest.approx(x["ema"][step].item(), rel=1e-12)
    assert latf.ratio < 1
