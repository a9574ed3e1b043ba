"""prime-rl's recorded losses (it is on no registry) beside tokenrl's in their place."""

import dataclasses
import importlib
import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from golden_data import INDEX, arrays
from host_source import compared, with_gradient
from paths import ROOT

import tokenrl

NAME = "tokenrl.integrations.prime_rl"
CASES = INDEX["prime_rl_loss"]["cases"]


@dataclasses.dataclass
class LossInputs:
    trainer_logprobs: Any
    inference_logprobs: Any
    ref_logprobs: Any
    advantages: Any
    loss_mask: Any
    loss_weights: Any = None


@dataclasses.dataclass
class LossOutputs:
    loss: Any
    metrics: Any


def settings(case):
    """The configuration class of prime-rl's that a case was recorded with: its fields and their values there."""
    fields = {key: value for key, value in CASES[case]["config"].items() if key != "type"}
    return dataclasses.make_dataclass("Config", [(key, float, value) for key, value in fields.items()])


@pytest.fixture
def host(monkeypatch):
    """tokenrl.integrations.prime_rl above a prime-rl of what it asks for."""
    package, loss, configs = map(ModuleType, ("prime_rl", "prime_rl.trainer.rl.loss", "prime_rl.configs.trainer"))
    package.__version__, loss.LossOutputs = "0.8.0", LossOutputs
    configs.DefaultLossConfig, configs.IPOLossConfig = settings("default_settings"), settings("ipo")
    for module in (package, loss, configs):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)
    vars(tokenrl.integrations).pop("prime_rl", None)


def evaluated(host, x, **kwargs):
    def loss(logp):
        given = LossInputs(logp, x["rollout_logp"], None, x["advantages"], x["mask"], x.get("loss_weights"))
        found = host.loss(given, **kwargs)
        return found.loss, found.metrics

    return with_gradient(loss, x["logp"])


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_prime_rl(case, host):
    x, kwargs = arrays("prime_rl_loss", case), dict(CASES[case]["config"])
    name = {"default": {}, "ipo": {"objective": "ipo"}}[kwargs.pop("type")]
    found = evaluated(host, x, **name, **kwargs)
    assert max(compared((x["loss"], x["grad_logp"]), found[:2])) < 1e-14
    metrics = {key: value.item() for key, value in found[2][0].items()}
    assert metrics == pytest.approx(CASES[case]["metrics"], rel=1e-7)


def test_the_defaults_are_those_of_prime_rl_s_configuration(host):
    x, config = arrays("prime_rl_loss", "default_settings"), CASES["default_settings"]["config"]
    host.configured.cache_clear()
    assert torch.equal(evaluated(host, x)[1], evaluated(host, x, **{k: v for k, v in config.items() if k != "type"})[1])
    with pytest.raises(TypeError, match="kl_tua"):
        evaluated(host, x, kl_tua=0.1)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_of_the_table(weighted, host):
    x = arrays("prime_rl_loss", "default_weights" if weighted else "default")
    found = evaluated(host, x, objective="ctpo", eps_low=0.03)
    row, ends = tokenrl.objective("ctpo", eps_low=0.03), torch.tensor([0, len(x["logp"])])
    truth = with_gradient(
        lambda logp: tokenrl.policy_loss(
            row, logp, x["rollout_logp"], x["advantages"], mask=x["mask"], cu_seqlens=ends, advantages_per="token",
            token_weight=x.get("loss_weights"), aggregation="token-sum",
        ), x["logp"],
    )  # fmt: skip
    assert torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1])
    metrics = truth[2][0]
    expected = {
        "is_masked_low": metrics.clip_low,
        "is_masked_high": metrics.clip_high,
        "mismatch_kl": metrics.approx_kl,
    }
    assert {key: value.item() for key, value in found[2][0].items()} == pytest.approx(expected)


def test_its_own_loss_is_a_row_too_whose_kl_tau_is_its_own(host):
    x = arrays("prime_rl_loss", "default_settings")
    found = [evaluated(host, x, objective=name, kl_tau=0.1)[:2] for name in ("default", "prime_rl")]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    plain = evaluated(host, x, objective="prime_rl", kl_tau=0.0)[0]
    square = (x["logp"] - x["rollout_logp"])[x["mask"]].square() * x["loss_weights"][x["mask"]]
    torch.testing.assert_close(found[1][0] - plain, 0.1 * square.sum().to(plain), rtol=1e-12, atol=1e-14)


def test_a_sequence_without_tokens(host):
    x = arrays("prime_rl_loss", "default")
    x["mask"] = torch.zeros_like(x["mask"])
    for kwargs in ({}, {"objective": "ctpo"}):
        loss, grad, (metrics,) = evaluated(host, x, **kwargs)
        assert loss == 0 and not grad.any() and not any(metrics.values())


REFUSED = {
    "clip_cov": "^objective: got 'clip_cov', accepted: a row of single sequences, which is what prime_rl hands to its",
    "ba": "^objective: got 'ba', which needs group ids, accepted: a row of what prime_rl hands to a policy loss",
    "cptoo": "^objective: got 'cptoo', .*Did you mean 'ctpo'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_prime_rl_cannot_feed_is_refused(name, host):
    with pytest.raises(ValueError, match=REFUSED[name]):
        evaluated(host, arrays("prime_rl_loss", "default"), objective=name)


def test_versions(host, monkeypatch):
    monkeypatch.delitem(sys.modules, NAME)
    sys.modules["prime_rl"].__version__ = "0.7.0"
    with pytest.raises(ImportError, match="^prime_rl: got 0.7.0, accepted: prime_rl 0.8.0 to 0.8.0 for the loss"):
        importlib.import_module(NAME)


def test_the_example_names_the_loss(host):
    example = (ROOT / "examples/prime_rl_ctpo.toml").read_text()
    module, _, name = re.search(r'import_path = "(.*)"', example)[1].rpartition(".")  # as prime-rl takes it apart
    assert getattr(importlib.import_module(module), name) is host.loss
    kwargs = dict(re.findall(r"(\w+) = (\"?[\w.]+\"?)", re.search(r"kwargs = \{(.*)\}", example)[1]))
    tokenrl.objective(kwargs.pop("objective").strip('"'), **{key: float(value) for key, value in kwargs.items()})
