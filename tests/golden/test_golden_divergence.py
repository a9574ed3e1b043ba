"""token_divergence against what was recorded at high precision, from TRL and from AdaKD (tests/golden)."""

import pytest
import torch
from cases import backends_to_test, device_of, thinned
from golden_data import INDEX, arrays, near

import tokenrl
from tokenrl.methods import akl

KINDS = {"kl_second_first": "forward_kl", "kl_first_second": "reverse_kl", "jsd_half": "jsd", "tv": "total_variation"}
ADAKD = {  # and whether its value lacks the teacher's entropy
    "forward_kl": ("forward_kl", False), "reverse_kl": ("reverse_kl", False),
    "js_distance": (tokenrl.divergence("jsd", beta=0.1), False), "tv_distance": ("total_variation", False),
    "skewed_forward_kl": ("skew_forward_kl", True), "skewed_reverse_kl": ("skew_reverse_kl", False),
    "ab_div": ("alpha_beta", False),
}  # fmt: skip
# The interpreter subtracts -inf from itself before it selects.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def cases(family):
    return [(case, b) for b in backends_to_test() for case in thinned(list(INDEX[family]["cases"]), b)]


def run(logits, other, kind, backend, **more):
    """(the divergences, the gradient of their sum by the logits)."""
    logits, other = (x.to(device_of(backend)) for x in (logits, other))
    logits = logits.requires_grad_()
    found = tokenrl.token_divergence(logits, other, kind, backend=backend, **more)
    return found.detach(), torch.autograd.grad(found.sum(), logits)[0].cpu()


@pytest.mark.parametrize("case,backend", cases("divergences"))
def test_at_high_precision(case, backend):
    x, config = arrays("divergences", case), INDEX["divergences"]["cases"][case]["config"]
    more = {name: value for name, value in config.items() if value is not None}
    more |= {f"other_{name}": value for name, value in more.items()}
    for recorded, kind in KINDS.items():
        found, grad = run(x["logits"], x["second"], kind, backend, **more)
        near(found, x[recorded], recorded)
        if f"grad_{recorded}" in x:
            expected = x[f"grad_{recorded}"]
            near(grad[: len(expected)], expected, f"gradient of {recorded}")
    found, grad = run(x["logits"], x["second"], "squared_hellinger", backend, **more)
    near(found.sqrt(), x["hellinger"], "hellinger")
    if "grad_hellinger" in x:
        expected, root = x["grad_hellinger"], found.sqrt().cpu()[:, None]
        near((grad / (2 * root))[: len(expected)], expected, "gradient of hellinger")


@pytest.mark.parametrize("case,backend", cases("trl_gkd"))
def test_trl_gkd(case, backend):
    x, config = arrays("trl_gkd", case), INDEX["trl_gkd"]["cases"][case]["config"]
    beta, labels = config["beta"], x["labels"]
    kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta) or tokenrl.divergence("jsd", beta=beta)
    count = config.get("num_items_in_batch") or (1 if config.get("reduction") == "sum" else (labels != -100).sum())
    how = {"temperature": config["temperature"], "row_mask": (labels != -100).to(device_of(backend))}
    found, grad = run(x["student_logits"], x["teacher_logits"], kind, backend, **how)
    near(found.cpu().sum() / count, x["loss"], "loss")
    near(grad / count, x["grad_student_logits"], "gradient")
    if "token_divergence" in x:
        near(found.cpu(), torch.where(labels != -100, x["token_divergence"], 0), "per token")


@pytest.mark.parametrize("case,backend", cases("adakd_divergences"))
def test_adakd(case, backend):
    """Mixtures are clamped at 1e-8, which no entry reaches."""
    x = arrays("adakd_divergences", case)
    rows, r = (x["labels"] != -100).to(device_of(backend)), x["teacher_logits"].log_softmax(-1)
    for name, (kind, lacks_entropy) in ADAKD.items():
        found, _ = run(x["logits"], x["teacher_logits"], kind, backend)
        missing = (r.exp() * r).sum(-1) if lacks_entropy else 0
        near((found.cpu() - missing).flatten(), x[f"token_{name}"], name, rtol=1e-6)
        _, grad = run(x["logits"], x["teacher_logits"], kind, backend, row_mask=rows)
        near(grad / rows.sum().cpu(), x[f"grad_{name}"], f"gradient of {name}", rtol=1e-6)


def test_adaptive_kl():
    """AKL of AdaKD's code: forward and reverse KL by where the two models differ, the weights without gradient."""
    x = arrays("adakd_divergences", "divergences")
    logits, teacher, mask = x["logits"].requires_grad_(), x["teacher_logits"], x["labels"] != -100
    share = akl.head_share(logits, teacher)
    assert 0.01 < share.min() and share.max() < 0.99
    forward, reverse = tokenrl.token_divergence(logits, teacher, ["forward_kl", "reverse_kl"])
    near((share * forward + (1 - share) * reverse).flatten(), x["token_adaptive_kl"], "per token")
    weights = {"forward_kd": share, "reverse_kd": 1 - share}
    losses = [
        tokenrl.distillation_loss(name, logits, teacher, mask=mask, token_weight=weight)[0]
        for name, weight in weights.items()
    ]
    near(sum(losses), x["loss_adaptive_kl"], "loss")
    near(torch.autograd.grad(sum(losses), logits)[0], x["grad_adaptive_kl"], "gradient")
