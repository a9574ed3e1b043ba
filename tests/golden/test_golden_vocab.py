"""token_logprobs and linear_token_logprobs against what was recorded at high precision and from TRL (tests/golden)."""

import pytest
import torch
from cases import backends_to_test, device_of, thinned
from golden_data import INDEX, arrays, near

import tokenrl
from tokenrl.instruments.parity import close
from tokenrl.logprobs.from_logits import OUTPUTS

RECORDED = {"logp": "logp", "entropy": "entropy", "lse": "lse", "log_sum_sq_probs": "log_sum_sq"}
# The interpreter multiplies -inf by 0 before it selects.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")


def cases(family):
    return [(case, b) for b in backends_to_test() for case in thinned(list(INDEX[family]["cases"]), b)]


def run(x, config, backend, outputs=OUTPUTS, **more):
    """(logits with a graph, TokenStats) on the backend's device."""
    device = device_of(backend)
    logits = x["logits"].to(device).requires_grad_()
    transform = {name: config[name] for name in ("temperature", "softcap", "logit_scale") if name in config}
    given = {name: value.to(device) for name, value in more.items()}
    ids = x["target"].to(device)
    return logits, tokenrl.token_logprobs(logits, ids, outputs=outputs, backend=backend, **transform, **given)


def values(x, stats):
    """Every output is the recorded one; the largest logit is recorded where max_prob is returned."""
    for name, recorded in RECORDED.items():
        near(getattr(stats, name), x[recorded], name)
    near(stats.mean_logit, x["mean_logit"], "mean_logit")
    near(stats.max_prob, (x["max_logit"] - x["lse"]).exp(), "max_prob")
    assert torch.equal(stats.rank.cpu(), x["rank"]) and torch.equal(stats.is_top1.cpu(), x["is_top1"])


def grads(stats, logits):
    """(recorded name, the gradient of each row's output with respect to that row's logits): the rows do not mix."""
    for name, recorded in RECORDED.items():
        yield recorded, torch.autograd.grad(getattr(stats, name).sum(), logits, retain_graph=True)[0].cpu()


@pytest.mark.parametrize("case,backend", cases("primitives_small"))
def test_small(case, backend):
    """97 and 1000 columns; gradients are recorded for the first rows."""
    x = arrays("primitives_small", case)
    logits, stats = run(x, INDEX["primitives_small"]["cases"][case]["config"], backend)
    values(x, stats)
    for name, grad in grads(stats, logits):
        expected = x[f"grad_{name}"]
        near(grad[: len(expected)], expected, f"gradient of {name}")


@pytest.mark.parametrize("case,backend", cases("primitives_medium"))
def test_medium(case, backend):
    """20 011 columns: the gradient at some of them, its sum against cos(v), and its length."""
    x = arrays("primitives_medium", case)
    logits, stats = run(x, INDEX["primitives_medium"]["cases"][case]["config"], backend)
    values(x, stats)
    probe = torch.arange(logits.shape[1], dtype=torch.float64).cos()
    for name, grad in grads(stats, logits):
        near(grad.gather(1, x["cols"]), x[f"grad_{name}_cols"], f"gradient of {name}")
        near(grad @ probe, x[f"grad_{name}_dot_probe"], f"gradient of {name}, against the probe")
        near(grad.norm(dim=1), x[f"grad_{name}_l2"], f"length of the gradient of {name}")


@pytest.mark.parametrize("case,backend", cases("trl_selective"))
def test_trl_selective(case, backend):
    entry = INDEX["trl_selective"]["cases"][case]
    x = arrays("primitives_small", entry["config"]["input"].split(":")[1]) | arrays("trl_selective", case)
    more = {"row_mask": x["row_mask"].bool()} if "row_mask" in x else {}
    # The released entropy is nan for rows with -inf logits; only the log-prob is recorded there.
    outputs = ("logp", "entropy") if "grad_logits" in x else ("logp",)
    logits, stats = run(x, entry["config"], backend, outputs, **more)
    loss = sum((x[f"up_{name}"].to(logits.device) * getattr(stats, name)).sum() for name in outputs)
    for name in outputs:
        near(getattr(stats, name), x[name], name)
    expected = x["grad_logits"] if "grad_logits" in x else x["grad_logits_logp_only"]
    near(torch.autograd.grad(loss, logits)[0], expected, "gradient")


def head(x, config, dtype, device):
    """(tensors with a graph, the arguments of linear_token_logprobs)."""
    tensors = {name: x[name].to(device, dtype).requires_grad_() for name in ("hidden", "weight", "bias") if name in x}
    transform = {name: config[name] for name in ("temperature", "softcap", "logit_scale")}
    return tensors, {**tensors, "ids": x["target"].to(device), **transform}


def of_head(stats, x, tensors, names):
    """Gradients by the name of their tensor, of the recorded upstream gradients of these outputs."""
    values = [getattr(stats, name) for name in names]
    upstream = [x[f"up_{name}"].to(value) for name, value in zip(names, values, strict=True)]
    grads = torch.autograd.grad(values, tensors.values(), upstream, retain_graph=True)
    return {name: grad.cpu() for name, grad in zip(tensors, grads, strict=True)}


PULLED = {"logp": ("logp",), "entropy": ("entropy",), "both": ("logp", "entropy")}


def linear(x, config, dtype, backend, pulled=PULLED):
    """Whatever is recorded, by its name there; gradients of some sums only."""
    tensors, arguments = head(x, config, dtype, device_of(backend))
    stats = tokenrl.linear_token_logprobs(**arguments, outputs=("logp", "entropy", "lse"), backend=backend)
    found = {name: getattr(stats, name).detach().cpu() for name in ("logp", "entropy", "lse")}
    for suffix in pulled:
        grads = of_head(stats, x, tensors, PULLED[suffix])
        found |= {f"grad_{name}_{suffix}": grad for name, grad in grads.items()}
    return {name: value for name, value in found.items() if name in x}


@pytest.mark.parametrize("case,backend", cases("linear"))
def test_linear(case, backend):
    """From hidden states: in fp64, and in fp32 by the tolerance rule."""
    entry, x = INDEX["linear"]["cases"][case], arrays("linear", case)
    found = linear(x, entry["config"], torch.float64, backend)
    assert found.keys() == {*entry["outputs"]}
    for name, value in found.items():
        near(value, x[name], name)
    kernel, base = (linear(x, entry["config"], torch.float32, name, ("both",)) for name in (backend, "reference"))
    for name, value in kernel.items():
        close(value, x[name], base[name], name)


# TRL's own fp32 rounding and ours: both stay within this of each other, relative to the largest entry.
FP32 = 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("case,backend", cases("trl_chunked"))
def test_trl_chunked(case, backend):
    """Its results were recorded in fp32 alone."""
    entry = INDEX["trl_chunked"]["cases"][case]
    x = arrays("linear", entry["config"]["input"].split(":")[1]) | arrays("trl_chunked", case)
    tensors, arguments = head(x, entry["config"], torch.float32, device_of(backend))
    stats = tokenrl.linear_token_logprobs(**arguments, outputs=OUTPUTS, backend=backend)
    theirs = {"logp": "log_probs", "entropy": "entropy", "mean_logit": "mean_logits"}
    found = {recorded: getattr(stats, name) for name, recorded in theirs.items()}
    found["log_sum_sq_probs"] = stats.log_sum_sq_probs
    grads = of_head(stats, x, tensors, PULLED["both"])
    found |= {f"grad_{name}": grad for name, grad in grads.items() if f"grad_{name}" in x}
    assert {*found, "is_top1"} == {*entry["outputs"]}
    assert torch.equal(stats.is_top1.cpu(), x["is_top1"])
    for name, value in found.items():
        error = (value.detach().cpu().double() - x[name]).abs().max()
        assert error <= FP32 * x[name].abs().max(), f"{name}: {error:.3e}"
