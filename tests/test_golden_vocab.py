"""token_logprobs against log-probs and entropies recorded at high precision and from TRL (tests/golden), in fp64."""

import pytest
import torch
from cases import backends_to_test, device_of
from golden_data import INDEX, arrays, near

import tokenrl

BACKENDS = backends_to_test()
# The interpreter multiplies -inf by 0 before it selects.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")


def transformed(logits, config):
    """What a model does to its logits before the softmax, apart from the temperature."""
    z = logits * config["logit_scale"]
    return z if config["softcap"] is None else config["softcap"] * torch.tanh(z / config["softcap"])


def run(x, ids, config, backend, outputs=("logp", "entropy")):
    """(raw logits with a graph, TokenStats) on the backend's device."""
    logits = x["logits"].to(device_of(backend)).requires_grad_()
    z = transformed(logits, {"logit_scale": 1.0, "softcap": None} | config)
    temperature = config["temperature"]
    return logits, tokenrl.token_logprobs(
        z, ids.to(z.device), temperature=temperature, outputs=outputs, backend=backend
    )


def grads(stats, logits):
    """The gradient of each row's output with respect to that row's logits: the rows do not mix."""
    return {
        name: torch.autograd.grad(getattr(stats, name).sum(), logits, retain_graph=True)[0]
        for name in ("logp", "entropy")
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", INDEX["primitives_small"]["cases"])
def test_small(case, backend):
    x = arrays("primitives_small", case)
    logits, stats = run(x, x["target"], INDEX["primitives_small"]["cases"][case]["config"], backend)
    for name, grad in grads(stats, logits).items():
        near(getattr(stats, name), x[name], name)
        near(grad, x[f"grad_{name}"], f"gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", INDEX["primitives_medium"]["cases"])
def test_medium(case, backend):
    """20 011 columns: the gradient at some of them, its sum against cos(v), and its length."""
    x = arrays("primitives_medium", case)
    logits, stats = run(x, x["target"], INDEX["primitives_medium"]["cases"][case]["config"], backend)
    probe = torch.arange(logits.shape[1], dtype=torch.float64).cos()
    for name, grad in grads(stats, logits).items():
        near(getattr(stats, name), x[name], name)
        grad = grad.cpu()
        near(grad.gather(1, x["cols"]), x[f"grad_{name}_cols"], f"gradient of {name}")
        near(grad @ probe, x[f"grad_{name}_dot_probe"], f"gradient of {name}, against the probe")
        near(grad.norm(dim=1), x[f"grad_{name}_l2"], f"length of the gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", INDEX["trl_selective"]["cases"])
def test_trl_selective(case, backend):
    entry = INDEX["trl_selective"]["cases"][case]
    x = arrays("primitives_small", entry["config"]["input"].split(":")[1]) | arrays("trl_selective", case)
    ids = x["target"]
    if "row_mask" in x:
        ids = torch.where(
            x["row_mask"].bool(), ids, tokenrl.logprobs.IGNORED
        )  # TRL's rows without a mask are our ignored ids
    # The released entropy is nan for rows with -inf logits; only the log-prob is recorded there.
    outputs = ("logp", "entropy") if "grad_logits" in x else ("logp",)
    logits, stats = run(x, ids, entry["config"], backend, outputs)
    loss = sum((x[f"up_{name}"].to(logits.device) * getattr(stats, name)).sum() for name in outputs)
    for name in outputs:
        near(getattr(stats, name), x[name], name)
    expected = x["grad_logits"] if "grad_logits" in x else x["grad_logits_logp_only"]
    near(torch.autograd.grad(loss, logits)[0], expected, "gradient")
