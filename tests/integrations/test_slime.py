"""Recorded losses of slime and of miles (they are on no registry) beside tokenrl's custom loss in theirs."""

import importlib
import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from golden_data import INDEX, arrays
from host_source import compared, with_gradient
from paths import ROOT
from torch.utils.checkpoint import checkpoint

import tokenrl
from tokenrl.integrations import hosts

MODULES = {"slime": "slime.backends.megatron_utils.loss", "miles": "miles.backends.training_utils.loss_hub.losses"}
CASES = [(name, case) for name in MODULES for case in INDEX[f"{name}_loss"]["cases"]]
LENGTHS = [7, 4, 9, 3]  # of the samples; the first two are one rollout
LIMITS = {"slime": 1e-14, "miles": 2e-7}  # miles exponentiates in fp32


class Host(ModuleType):
    """A module of the host's names. Its policy loss calls the other two by name, as the real one does, and gives what
    that gave: each token's loss by its weight, and the KL and entropy terms about the recorded log-probs."""

    def __init__(self, name, case):
        super().__init__(MODULES[name])
        self.name, self.x, self.entry = name, arrays(f"{name}_loss", case), INDEX[f"{name}_loss"]["cases"][case]
        self.calls = 0
        self.compute_policy_loss = lambda ppo_kl, advantages: (0 * ppo_kl, 0 * ppo_kl)

    def get_log_probs_and_entropy(self, logits):
        self.calls += 1
        found = {"log_probs": list(logits.split(self.lengths))}
        return (torch.empty(0), found) if self.name == "slime" else found

    def policy_loss_function(self, args, batch, logits, sum_of_sample_mean):
        found = self.get_log_probs_and_entropy(logits)
        logp, x = torch.cat((found[1] if self.name == "slime" else found)["log_probs"]), self.x
        per_token, clipped = self.compute_policy_loss(x["old_logp"] - logp.detach(), x["advantages"])
        rest = x["rest"] + ((logp - x["logp"]) * x["grad_rest"]).sum()
        reported = {key: torch.tensor(value) for key, value in self.entry["metrics"].items()}
        reported["pg_clipfrac"] = sum_of_sample_mean(clipped)
        return (x["weight"] * per_token).sum() + rest, reported

    lengths = LENGTHS

    @property
    def args(self):
        return SimpleNamespace(**self.entry["config"])

    @property
    def batch(self):
        names = {"advantages": "advantages", "log_probs": "old_logp", "rollout_log_probs": "rollout_logp"}
        parts = {key: list(self.x[ours].split(LENGTHS)) for key, ours in names.items()}
        return parts | {"loss_masks": list(self.x["mask"].double().split(LENGTHS)), "response_lengths": LENGTHS}

    def sum_of_sample_mean(self, values):
        masks = self.batch["loss_masks"]
        counts = [mask.sum() for mask in masks]
        counts = [counts[0] + counts[1]] * 2 + counts[2:]
        if self.args.calculate_per_token_loss:
            counts = [1] * len(masks)
        return sum((x * mask).sum() / n for x, mask, n in zip(values.split(LENGTHS), masks, counts, strict=True))


@pytest.fixture
def made(monkeypatch):
    """(name, case) -> (the host, the loss of tokenrl's module of that name)."""

    def make(name, case, version=None):
        host, package = Host(name, case), ModuleType(name)
        package.__version__ = version or hosts.HOSTS[name].newest
        monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setitem(sys.modules, MODULES[name], host)
        sys.modules.pop(f"tokenrl.integrations.{name}", None)
        return host, importlib.import_module(f"tokenrl.integrations.{name}").loss

    yield make
    for name in MODULES:
        sys.modules.pop(f"tokenrl.integrations.{name}", None)
        vars(tokenrl.integrations).pop(name, None)


def evaluated(host, loss, through=lambda loss, *given: loss(*given)):
    return with_gradient(lambda x: through(loss, host.args, host.batch, x, host.sum_of_sample_mean), host.x["logp"])


@pytest.mark.parametrize("name,case", CASES)
def test_the_numbers_are_those_of_the_host(name, case, made):
    host, loss = made(name, case)
    before = host.compute_policy_loss
    found = evaluated(host, loss)
    assert max(compared((host.x["loss"], host.x["grad_logp"]), found[:2])) < LIMITS[name]
    metrics = {key: value.item() for key, value in found[2][0].items()}
    assert metrics == pytest.approx(host.entry["metrics"], rel=1e-6, abs=1e-7)
    assert all(value.dim() == 0 and not value.requires_grad for value in found[2][0].values())
    assert host.compute_policy_loss is before
    assert host.get_log_probs_and_entropy.__func__ is Host.get_log_probs_and_entropy


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name,case", [("slime", "all"), ("miles", "kl"), ("slime", "gspo")])
def test_under_a_checkpoint(name, case, reentrant, made):
    """--recompute-loss-function: of slime without reentry, of miles with it. The weights cost no third pass."""
    host, loss = made(name, case)
    plain, host.calls = evaluated(host, loss), 0
    found = evaluated(host, loss, lambda *x: checkpoint(*x, use_reentrant=reentrant))
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1]) and host.calls == 2


@pytest.mark.parametrize("name", MODULES)
def test_a_row_of_the_table(name, made, monkeypatch):
    """Under the weights of the host: its correction, its mean per rollout; beside its KL and entropy terms."""
    monkeypatch.setenv(hosts.VARIABLE, json.dumps({"ctpo": {"eps_low": 0.03}}))
    host, loss = made(name, "all")
    found, x = evaluated(host, loss), host.x
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    truth = with_gradient(
        lambda logp: tokenrl.policy_loss(
            tokenrl.objective("ctpo", eps_low=0.03), logp, x["old_logp"], x["advantages"], mask=x["mask"],
            cu_seqlens=ends, advantages_per="token", token_weight=x["weight"], aggregation="token-sum",
        ), x["logp"],
    )  # fmt: skip
    torch.testing.assert_close(found[0], truth[0] + x["rest"])
    torch.testing.assert_close(found[1], truth[1] + x["grad_rest"])
    metrics = truth[2][0]
    clipped = (metrics.clip_low + metrics.clip_high) * metrics.tokens  # calculate_per_token_loss: a sum over tokens
    assert found[2][0]["pg_clipfrac"].item() == pytest.approx(clipped)


def test_a_row_with_a_form(made, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, '{"gmpo": {"eps_low": 0.3, "eps_high": 0.3}}')
    host, loss = made("slime", "per_token")
    found, x = evaluated(host, loss), host.x
    truth = with_gradient(
        lambda logp: tokenrl.policy_loss(
            tokenrl.objective("gmpo", eps_low=0.3, eps_high=0.3), logp, x["old_logp"], x["advantages"], mask=x["mask"],
            cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0), advantages_per="token", aggregation="token-sum",
        ), x["logp"],
    )  # fmt: skip
    assert max(compared(truth[:2], found[:2])) < 1e-12
    metrics = truth[2][0]
    clipped = (metrics.clip_low + metrics.clip_high) * metrics.tokens
    assert found[2][0]["pg_clipfrac"].item() == pytest.approx(clipped) and clipped > 0


def test_rows_take_the_host_s_bounds(made, monkeypatch):
    from tokenrl.integrations.custom_loss import row_of

    host, _ = made("slime", "dual")
    monkeypatch.setenv(hosts.VARIABLE, '{"dapo": {"eps_high": 0.7}}')
    gate = row_of("slime", host.args, 20.0).gate
    assert (gate.eps_low, gate.eps_high, gate.dual) == (0.2, 0.7, 1.5)


def test_parts_of_sequences(made, monkeypatch):
    """Context parallelism: a row of single tokens takes them, another says so."""
    host, loss = made("slime", "dual")
    monkeypatch.setattr(Host, "lengths", [3, 2, 5, 13])  # what is here of each sample
    found = evaluated(host, loss)
    assert max(compared((host.x["loss"], host.x["grad_logp"]), found[:2])) < 1e-14
    monkeypatch.setenv(hosts.VARIABLE, "ctpo")
    with pytest.raises(ValueError, match="^objective: got 'ctpo' under context parallelism, accepted: a row of single"):
        evaluated(host, loss)


def test_a_rank_without_tokens(made, monkeypatch):
    host, loss = made("slime", "kl")
    monkeypatch.setattr(Host, "lengths", [0])
    host.x = {key: value if value.dim() == 0 else value[:0] for key, value in host.x.items()}
    monkeypatch.setattr(Host, "sum_of_sample_mean", lambda self, x: x.sum())
    monkeypatch.setattr(Host, "batch", {"response_lengths": [5]})
    value, grad, (reported,) = evaluated(host, loss)
    assert value == host.x["rest"] and not grad.numel() and "ppo_kl" in reported


def test_what_cannot_train_is_refused_before(made, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, "ba")
    with pytest.raises(ValueError, match="^objective: got 'ba', which needs group ids, accepted: a row of what slime"):
        made("slime", "ppo")
    monkeypatch.delenv(hosts.VARIABLE)
    for name, oldest in (("slime", "0.3.1"), ("miles", "0.1.0")):
        with pytest.raises(ImportError, match=f"^{name}: got 0.0.0, accepted: {name} {oldest} to {oldest} for"):
            made(name, "ppo", version="0.0.0")
    monkeypatch.setattr(Host, "policy_loss_function", lambda self, args, batch: None)
    with pytest.raises(ValueError, match=r"^slime's policy_loss_function: got the parameters \(args, batch\)"):
        made("slime", "ppo")


@pytest.mark.parametrize("name", MODULES)
def test_the_example_names_the_loss(name, made):
    _, loss = made(name, "ppo")
    example = (ROOT / f"examples/{name}_ctpo.sh").read_text()
    module, _, function = re.search(r"--custom-loss-function-path (\S+)", example)[1].rpartition(".")
    assert getattr(importlib.import_module(module), function) is loss
    (row,) = json.loads(re.search(r"OBJECTIVE='(.*)'", example)[1])
    assert row in tokenrl.OBJECTIVES and "--loss-type custom_loss" in example
