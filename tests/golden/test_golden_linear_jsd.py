"""Distillation from hidden states against outputs of Liger and TRL (tests/golden)."""

import pytest
import torch
from golden_data import INDEX, arrays, near

import tokenrl

CASES = INDEX["linear_jsd"]["cases"]
NAMES = ("hidden", "weight", "bias")


def head(x, dtype=torch.float64):
    """(the student's tensors with a graph by their names there, the arguments of both heads)."""
    own = {name: x[f"student_{name}"].to(dtype).requires_grad_() for name in NAMES if f"student_{name}" in x}
    other = {f"other_{name}": x[f"teacher_{name}"].to(dtype) for name in NAMES if f"teacher_{name}" in x}
    return own, own | other


def row(beta):
    return {0.0: "forward_kd", 1.0: "reverse_kd"}.get(beta) or tokenrl.distillation("gkd", beta=beta)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("liger")])
def test_liger(case):
    """The chunked loss was recorded in fp64, with a cross entropy at a temperature of 1 beside; the op in fp32."""
    x, config = arrays("linear_jsd", case), CASES[case]["config"]
    own, heads = head(x)
    rtol = 1e-9 if "chunked" in case else 3e-5
    mask = x["labels"] != -100 if "labels" in x else torch.ones(len(x["student_hidden"]), dtype=torch.bool)
    how = {"mask": mask, "cu_seqlens": torch.tensor([0, len(mask)])}
    loss, _ = tokenrl.linear_distillation_loss(row(config["beta"]), **heads, **how, temperature=config["temperature"])
    loss = config.get("weight_soft", 1.0) * loss
    if config.get("weight_hard"):
        ids = torch.where(mask, x["labels"], 0)
        logp = tokenrl.linear_token_logprobs(**own, ids=ids, row_mask=mask, outputs=["logp"]).logp
        loss = loss - config["weight_hard"] * logp.sum() / mask.sum()
    near(loss, x["loss"], "loss", rtol)
    for name, grad in zip(own, torch.autograd.grad(loss, own.values()), strict=True):
        size = x[f"grad_{name}"].abs().max()
        assert (grad - x[f"grad_{name}"]).abs().max() <= rtol * size, name


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("trl")])
def test_trl(case):
    """Recorded in fp32, each row's divergence under a gradient of its own."""
    x, config = arrays("linear_jsd", case), CASES[case]["config"]
    own, heads = head(x)
    how = {name: config[name] for name in ("temperature", "softcap", "logit_scale")}
    other = {"other_softcap": config["softcap"], "other_logit_scale": config["logit_scale"]}
    kind = tokenrl.distillation(row(config["beta"])).divergence
    found = tokenrl.linear_token_divergence(**heads, kind=kind, **how, **other)
    near(found, x["divergence"], "divergence", 1e-4)
    for name, grad in zip(own, torch.autograd.grad((x["upstream"] * found).sum(), own.values()), strict=True):
        size = x[f"grad_{name}"].abs().max()
        assert (grad - x[f"grad_{name}"]).abs().max() <= 3e-5 * size, name
    ids = torch.zeros(len(found), dtype=torch.int64)
    near(tokenrl.linear_token_logprobs(**own, ids=ids, **how).entropy, x["entropy"], "entropy", 1e-5)
