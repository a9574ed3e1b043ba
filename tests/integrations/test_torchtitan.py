"""torchtitan's recorded RL loss (its experiment is in no wheel) beside tokenrl's subclass of it."""

import dataclasses
import importlib
import sys
from types import ModuleType

import pytest
import torch
from golden_data import INDEX, arrays
from host_source import compared, with_gradient
from paths import ROOT

import tokenrl

NAME, DAPO = "tokenrl.integrations.torchtitan", "torchtitan.experiments.rl.losses.dapo"
CASES = INDEX["torchtitan_loss"]["cases"]


class DAPOLoss:
    """In torchtitan's place: it asks its module for log-probs, and reports what the real one did."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        ratio_clip_low: float = 0.2
        ratio_clip_high: float = 0.2

    def __init__(self, config, *, compile_config=None):
        self.ratio_clip_low, self.ratio_clip_high = config.ratio_clip_low, config.ratio_clip_high

    def __call__(
        self, logits, labels, global_valid_tokens=None, *, generator_logprobs, advantages, loss_mask
    ):  # fmt: skip
        logp, entropy = sys.modules[DAPO].compute_logprobs(logits, labels, return_entropy=True)
        assert not torch.is_grad_enabled() and not logp.requires_grad and torch.equal(entropy, logp.abs())
        return torch.zeros(()), {key: torch.tensor(value) for key, value in CASES[labels]["metrics"].items()}


@pytest.fixture
def host(monkeypatch):
    """tokenrl.integrations.torchtitan above a torchtitan of that class, whose log-probs are its logits."""
    module = ModuleType(DAPO)
    module.DAPOLoss, module._MAX_LOG_RATIO, module.calls = DAPOLoss, 10.0, 0

    def compute_logprobs(logits, labels, *, return_entropy=False):
        module.calls += 1
        return logits, logits.detach().abs()

    module.compute_logprobs = compute_logprobs
    package, parent = ModuleType("torchtitan"), DAPO.rpartition(".")[0]
    package.__version__ = "0.2.2"
    losses = ModuleType(parent)
    losses.dapo = module
    for loaded in (package, losses, module):
        monkeypatch.setitem(sys.modules, loaded.__name__, loaded)
    for name in ("torchtitan.experiments", "torchtitan.experiments.rl"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)
    vars(tokenrl.integrations).pop("torchtitan", None)


def evaluated(host, case, **config):
    x, recorded = arrays("torchtitan_loss", case), CASES[case]["config"]
    bounds = {key: recorded[key] for key in ("ratio_clip_low", "ratio_clip_high")}
    loss = host.PolicyLoss(host.PolicyLoss.Config(**bounds, **config))
    given = {"generator_logprobs": x["rollout_logp"], "advantages": x["advantages"], "loss_mask": x["mask"]}
    return x, with_gradient(lambda logp: loss(logp, case, recorded["global_valid_tokens"], **given), x["logp"])


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_torchtitan(case, host):
    before = sys.modules[DAPO].compute_logprobs
    x, found = evaluated(host, case)
    assert max(compared((x["loss"], x["grad_logp"]), found[:2])) < 1e-12
    metrics = {key: value.item() for key, value in found[2][0].items()}
    assert metrics == pytest.approx(CASES[case]["metrics"], rel=1e-6)  # torch.tensor(...) is fp32
    assert sys.modules[DAPO].compute_logprobs is before and sys.modules[DAPO].calls == 1


@pytest.mark.parametrize("name", ["cispo", "sapo", "reinforce"])
def test_a_row_of_the_table(name, host):
    x, found = evaluated(host, "unscored", objective=name)
    row, ends = tokenrl.objective(name), torch.tensor([0, len(x["logp"])])
    truth = with_gradient(
        lambda logp: tokenrl.policy_loss(
            row, logp, x["rollout_logp"], x["advantages"], mask=x["mask"] & x["rollout_logp"].isfinite(),
            cu_seqlens=ends, advantages_per="token", aggregation="token-mean", normalizer=37.0,
        ), x["logp"],
    )  # fmt: skip
    assert torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1])
    assert found[2][0]["loss/mean"] == found[0]


def test_rows_take_torchtitan_s_bounds(host):
    config = host.PolicyLoss.Config(ratio_clip_low=0.1, objective="ppo", parameters={"eps_high": 0.7})
    gate = host.PolicyLoss(config).row.gate
    assert (gate.eps_low, gate.eps_high) == (0.1, 0.7)


REFUSED = {
    "ctpo": "^objective: got 'ctpo', accepted: a row of single tokens; torchtitan hands its loss no sequences",
    "fiberpo": "^objective: got 'fiberpo', accepted: a row of single tokens",
    "ba": "^objective: got 'ba', which needs group ids, accepted: a row of what torchtitan hands to a policy loss",
    "cptoo": "^objective: got 'cptoo', .*Did you mean 'ctpo'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_is_refused_where_it_is_built(name, host):
    with pytest.raises(ValueError, match=REFUSED[name]):
        host.PolicyLoss(host.PolicyLoss.Config(objective=name))


def test_versions_and_signatures(host, monkeypatch):
    monkeypatch.delitem(sys.modules, NAME)
    monkeypatch.setattr(DAPOLoss, "__call__", lambda self, pred: None)
    with pytest.raises(ValueError, match=r"^torchtitan's DAPOLoss: got the parameters \(self, pred\)"):
        importlib.import_module(NAME)
    sys.modules["torchtitan"].__version__ = "0.2.1"
    with pytest.raises(ImportError, match="^torchtitan: got 0.2.1, accepted: torchtitan 0.2.2 to 0.2.2 for the loss"):
        importlib.import_module(NAME)


def test_the_example_s_loss_is_built(host):
    example = (ROOT / "examples/torchtitan_cispo.py").read_text()
    found = {}
    exec(example[example.index("from tokenrl") : example.index("\n\n\ndef")], found)
    assert host.PolicyLoss(found["LOSS"]).row.name == "cispo"
