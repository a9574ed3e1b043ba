"""token_divergence against what was recorded at high precision, from TRL and from AdaKD (tests/golden)."""

import pytest
import torch
from cases import backends_to_test, device_of, thinned
from golden_data import INDEX, arrays, near

import tokenrl

KINDS = {"kl_second_first": "forward_kl", "kl_first_second": "reverse_kl", "jsd_half": "jsd", "tv": "total_variation"}
ADAKD = {
    "forward_kl": "forward_kl", "reverse_kl": "reverse_kl", "js_distance": tokenrl.divergence("jsd", beta=0.1),
    "tv_distance": "total_variation", "skewed_forward_kl": "skew_forward_kl", "skewed_reverse_kl": "skew_reverse_kl",
    "ab_div": "alpha_beta",
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
    """Its skewed forward KL lacks the teacher's entropy; mixtures are clamped at 1e-8, which no entry reaches."""
    x = arrays("adakd_divergences", case)
    rows = (x["labels"] != -100).to(device_of(backend))
    for name, kind in ADAKD.items():
        found, _ = run(x["logits"], x["teacher_logits"], kind, backend)
        missing = 0
        if name in ("skewed_forward_kl", "forward_kl"):
            r = x["teacher_logits"].log_softmax(-1)
            missing = (r.exp() * r).sum(-1) if name == "skewed_forward_kl" else 0
        if name == "forward_kl" and not torch.allclose(found.cpu().flatten(), x["token_forward_kl"]):
            missing = (r.exp() * r).sum(-1)
        near((found.cpu() - missing).flatten(), x[f"token_{name}"], name, rtol=1e-6)
        _, grad = run(x["logits"], x["teacher_logits"], kind, backend, row_mask=rows)
        near(grad / rows.sum().cpu(), x[f"grad_{name}"], f"gradient of {name}", rtol=1e-6)
