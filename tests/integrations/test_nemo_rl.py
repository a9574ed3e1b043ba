"""NeMo-RL's recorded losses (it is on no registry) beside tokenrl's subclass of its loss."""

import enum
import importlib
import json
import pickle
import re
import sys
from types import ModuleType

import pytest
import torch
from golden_data import INDEX, arrays
from host_source import compared, with_gradient
from paths import ROOT

import tokenrl
from tokenrl.integrations import hosts

NAME, LOSS = "tokenrl.integrations.nemo_rl", "nemo_rl.algorithms.loss"
FAMILY = INDEX["nemo_rl_loss"]
COUNTS = {"global_valid_seqs": torch.tensor(17.0), "global_valid_toks": torch.tensor(113.0)}


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class ClippedPGLossFn:
    """In NeMo-RL's place: the attributes that its constructor gave the real one, and what that returned for advantages
    of 0: its KL and NLL terms, about the recorded log-probs, and the metrics."""

    def __init__(self, cfg, use_fused_linear_logprobs=False):
        case = FAMILY["cases"][cfg]
        vars(self).update(case["config"], loss_type=LossType(case["config"]["loss_type"]))
        self.case, self.metrics = cfg, case["metrics"]

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        assert not data["advantages"].any()
        x = arrays("nemo_rl_loss", self.case)
        rest = x["rest"] + ((next_token_logprobs - x["logp"]) * x["grad_rest"]).sum()
        return rest, {**self.metrics, "loss": rest.item()}


@pytest.fixture
def host(monkeypatch):
    """tokenrl.integrations.nemo_rl above a NeMo-RL whose modules hold the class."""
    package, functions, grpo = (
        ModuleType(name) for name in (LOSS, f"{LOSS}.loss_functions", "nemo_rl.algorithms.grpo")
    )
    functions.LossType, package.loss_functions = LossType, functions
    for module in (package, functions, grpo):
        module.ClippedPGLossFn = ClippedPGLossFn
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("nemo_rl", "nemo_rl.algorithms"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["nemo_rl"].__version__ = "0.6.0+7ea279a"
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)
    vars(tokenrl.integrations).pop("nemo_rl", None)


def given(x):
    """The batch as NeMo-RL's worker hands it over: a column before the first prediction."""

    def padded(t):
        return torch.cat([torch.zeros_like(t[:, :1]), t], 1)

    return {
        "token_mask": padded(x["mask"].double()), "sample_mask": x["sample_mask"],
        "advantages": padded(x["advantages"]),
        "prev_logprobs": padded(x["old_logp"]), "generation_logprobs": padded(x["rollout_logp"]),
        "reference_policy_logprobs": padded(x["ref_logp"]), "rewards": torch.tensor([1.0, -1.0, 0.0, 1.0, 2.0]),
    }  # fmt: skip


@pytest.mark.parametrize("case", FAMILY["cases"])
def test_the_numbers_are_those_of_nemo_rl(case, host):
    x, ours = arrays("nemo_rl_loss", case), host.ClippedPGLossFn(case)
    data = given(x)
    found = with_gradient(lambda logp: ours(logp, data, **COUNTS), x["logp"])
    # What is left is NeMo-RL's own: it adds 1e-8 to a sequence's count.
    limit = 1e-8 if ours.loss_type is LossType.SEQUENCE_LEVEL else 1e-12
    assert max(compared((x["loss"], x["grad_logp"]), found[:2])) < limit
    assert found[2][0] == pytest.approx(FAMILY["cases"][case]["metrics"], rel=1e-7)
    assert torch.equal(data["advantages"][:, 1:], x["advantages"])  # as they were handed over


def test_without_other_terms_nothing_of_nemo_rl_s_is_differentiated(host, monkeypatch):
    seen = []
    monkeypatch.setattr(ClippedPGLossFn, "__call__", lambda self, *args, **kwargs: (
        seen.append(torch.is_grad_enabled()) or torch.zeros(()), {}))  # fmt: skip
    for case in ("grpo", "k3", "positive_nll"):
        x = arrays("nemo_rl_loss", case)
        with_gradient(lambda logp, case=case, x=x: host.ClippedPGLossFn(case)(logp, given(x), **COUNTS), x["logp"])
    assert seen == [False, True, True]


def test_a_row_of_the_table(host, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, json.dumps({"ctpo": {"eps_low": 0.03}}))
    x, ours = arrays("nemo_rl_loss", "tis_upper"), host.ClippedPGLossFn("tis_upper")
    monkeypatch.delenv(hosts.VARIABLE)
    ours = pickle.loads(pickle.dumps(ours))  # as NeMo-RL's workers get it, where the variable need not be
    found = with_gradient(lambda logp: ours(logp, given(x), **COUNTS), x["logp"])
    mask, row = x["mask"] & (x["sample_mask"] > 0)[:, None], tokenrl.objective("ctpo", eps_low=0.03)
    truth = with_gradient(
        lambda logp: tokenrl.policy_loss(
            row, logp, x["old_logp"], x["advantages"], mask=mask, aggregation="token-mean", normalizer=113.0,
            rollout_logp=x["rollout_logp"], correction={"bound": "truncate", "high": 1.3, "clamp": None},
        ), x["logp"],
    )  # fmt: skip
    assert max(compared(truth[:2], found[:2])) < 1e-14 and found[2][0]["loss"] == found[0].item()


def test_rows_take_nemo_rl_s_bounds(host, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, '{"dapo": {"eps_high": 0.7}}')
    gate = host.ClippedPGLossFn("dual").tokenrl_row.gate
    assert (gate.eps_low, gate.eps_high, gate.dual) == (0.2, 0.7, 1.5)


def test_use_and_the_launcher(host, monkeypatch, tmp_path):
    script = tmp_path / "run_grpo.py"
    script.write_text(
        "import sys\nfrom nemo_rl.algorithms.grpo import ClippedPGLossFn\nsys.seen = ClippedPGLossFn, sys.argv"
    )
    monkeypatch.setattr(sys, "argv", ["nemo_rl.py", str(script), "--config", "a.yaml"])
    for _ in range(2):
        host.use()
    host.main()
    assert sys.seen == (host.ClippedPGLossFn, [str(script), "--config", "a.yaml"])
    assert sys.modules[f"{LOSS}.loss_functions"].ClippedPGLossFn is host.ClippedPGLossFn
    del sys.seen


def test_what_cannot_train_is_refused_before(host, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, "ba")
    with pytest.raises(ValueError, match="^objective: got 'ba', which needs group ids, accepted: a row of what nemo"):
        host.use()
    monkeypatch.delenv(hosts.VARIABLE)
    monkeypatch.setattr(ClippedPGLossFn, "__call__", lambda self, logits, data: None)
    with pytest.raises(ValueError, match=r"^ClippedPGLossFn.__call__: got the parameters \(self, logits, data\)"):
        host.use()
    monkeypatch.delitem(sys.modules, NAME)
    sys.modules["nemo_rl"].__version__ = "0.5.0"
    with pytest.raises(ImportError, match="^nemo_rl: got 0.5.0, accepted: nemo_rl 0.6.0 to 0.6.0 for the loss"):
        importlib.import_module(NAME)
    sys.modules["nemo_rl"].__version__ = "0.7.0"
    with pytest.warns(UserWarning, match="^nemo_rl: got 0.7.0, held to nemo_rl 0.6.0"):
        importlib.import_module(NAME)


def test_the_example_s_settings_are_nemo_rl_s():
    given = dict(re.findall(r"^ +loss_fn\.(\w+)=(\S+)", (ROOT / "examples/nemo_rl_ctpo.sh").read_text(), re.MULTILINE))
    known = {"token_level_loss", *FAMILY["cases"]["grpo"]["config"]}
    assert given["token_level_loss"] == "false" and given.keys() <= known
    assert tokenrl.OBJECTIVES["ctpo"].aggregation == "seq-mean-token-mean"
