"""tokenrl's rows in verl's registry: by name, by parameters, in a fresh process of the real verl; what is refused."""

import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import verl_source

if verl_source.folder() is None:
    pytest.skip("verl is not installed (make test installs it, without its dependencies)", allow_module_level=True)

from paths import ROOT
from verl_batches import batch, evaluated

import tokenrl
from tokenrl.integrations import hosts, verl
from tokenrl.integrations.hosts import NEEDS
from tokenrl.integrations.verl import settings
from tokenrl.integrations.verl.modes import MODES, SETTINGS, nothing

ROWS = [name for name, row in tokenrl.OBJECTIVES.items() if not name.startswith("kl_") or name == "kl_cov"]


@pytest.mark.parametrize("name", [name for name in ROWS if name not in NEEDS])
def test_each_row_by_its_name(name, core):
    """The row with verl's settings where it is a mode of verl's, and its own parameters elsewhere."""
    given, mode = batch(1, 0.3, False), tokenrl.OBJECTIVES[name].aggregation
    weight = 2 * torch.rand(given[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = evaluated(core.get_policy_loss_fn(f"tokenrl_{name}"), given, mode, {}, weight, dro_beta=0.1)
    logp, old, advantages, mask = given
    config = verl_source.actor_config(mode, dro_beta=0.1)
    row, logp = tokenrl.objective(name, **SETTINGS.get(name, nothing)(config)), logp.clone().requires_grad_()
    if name == "vespo":
        old, weight = old - weight.log(), None
    torch.manual_seed(0)
    loss, metrics = tokenrl.policy_loss(
        row, logp, old, advantages, mask=mask, token_weight=weight,
        normalizer=mask.any(1).sum() * 9 if mode == "seq-mean-token-sum-norm" else None,
    )  # fmt: skip
    loss.backward()
    assert torch.equal(found[0], loss.detach()) and torch.equal(found[1], logp.grad)
    k1 = torch.where(mask, (given[1] - given[0]).clamp(-row.clamp, row.clamp), 0).sum() / mask.sum()
    expected = {
        "actor/pg_clipfrac": metrics.clip_low + metrics.clip_high, "actor/pg_clipfrac_lower": metrics.clip_dual,
        "actor/ppo_kl": k1.item(), "tokenrl/ess": metrics.ess, "tokenrl/ratio_max": metrics.ratio_max,
    }  # fmt: skip
    assert found[2] == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_parameters_of_the_environment_and_of_the_config(core):
    parameters, switches = settings.read('{"ctpo": {"eps_low": 0.03, "power": 0.25}, "ppo": {"eps_high": 0.5}}')
    settings.register_table(parameters)
    assert switches == []
    config = verl_source.actor_config(clip_ratio_low=0.1)
    row = core.get_policy_loss_fn("tokenrl_ctpo").row_for(config)
    assert (row.gate.eps_low, row.gate.power, row.gate.eps_high) == (0.03, 0.25, 0.05)
    row = core.get_policy_loss_fn("tokenrl_ppo").row_for(config)
    assert (row.gate.eps_low, row.gate.eps_high, row.gate.dual) == (0.1, 0.5, 3.0)

    class Open:  # an OmegaConf that is not a struct, as in verl 0.6
        clip_ratio, policy_loss = 0.2, type("PolicyLoss", (), {"tokenrl_objective_kwargs": {"eps_high": 0.4}})

    row = core.get_policy_loss_fn("tokenrl_ppo").row_for(Open)
    assert (row.gate.eps_low, row.gate.eps_high) == (0.2, 0.4)


def test_register_a_row_of_one_s_own(core):
    mine = tokenrl.objective("ppo", eps_high=0.4)
    verl.register("mine", mine)
    row = core.get_policy_loss_fn("tokenrl_mine").row_for(verl_source.actor_config())
    assert (row.gate.eps_high, row.gate.dual) == (0.4, math.inf)  # verl's settings have no part in it
    verl.register("wide", "dapo", eps_low=0.3)
    assert core.get_policy_loss_fn("tokenrl_wide").row_for(verl_source.actor_config()).gate.eps_low == 0.3


def test_another_aggregation_than_the_method_s_is_named(core):
    ours = core.get_policy_loss_fn("tokenrl_minpro")
    with pytest.warns(UserWarning, match="^tokenrl_minpro: loss_agg_mode 'seq-mean-token-sum', the method's own is"):
        evaluated(ours, batch(0, 0.3, False), "seq-mean-token-sum", {}, None)


@pytest.mark.parametrize("name", NEEDS)
def test_rows_that_verl_cannot_feed_are_refused(name, core):
    message = f"^loss_mode: got tokenrl_{name}, which needs {NEEDS[name]}, accepted: a row of what verl hands"
    with pytest.raises(ValueError, match=message):
        evaluated(core.get_policy_loss_fn(f"tokenrl_{name}"), batch(0, 0.3, False), "token-mean", {}, None)
    with pytest.raises(ValueError, match=message):
        verl.register(name)


CALLS = {
    "tokens": ({"mode": "token-mean"}, "^batch_num_tokens: got None, accepted: the count of the global batch; dp_size"),
    "sequences": (
        {"name": "tokenrl_dr_grpo", "mode": "seq-mean-token-sum-norm"},
        "^global_batch_size: got None, accepted: the count of the",
    ),
    "c": ({"clip_ratio_c": 0.5}, "^clip_ratio_c: got 0.5, accepted: a number above 1"),
    "beta": ({"name": "tokenrl_dro"}, "^dro_beta: got None, accepted: a number above 0"),
}


@pytest.mark.parametrize("name", CALLS)
def test_errors_of_a_call(name, core):
    options, message = CALLS[name]
    options = {"name": "tokenrl_ppo", "mode": "token-mean"} | options
    ours, mode = core.get_policy_loss_fn(options.pop("name")), options.pop("mode")
    with pytest.raises(ValueError, match=message):
        evaluated(ours, batch(0, 0.3, False), mode, {"dp_size": 2} if len(options) == 0 else {}, None, **options)


VARIABLES = {
    "no JSON": ("eps_low=1", "^TOKENRL_VERL: got eps_low=1, accepted: a JSON object as"),
    "a list": ("[1]", r"^TOKENRL_VERL: got \[1\], accepted: a JSON object"),
    "an unknown row": ('{"cptoo": {}}', "^TOKENRL_VERL: got 'cptoo', accepted: .*Did you mean 'ctpo'"),
    "an unknown parameter": ('{"ctpo": {"eps_lo": 1}}', "^parameter of 'ctpo': got 'eps_lo', .*Did you mean 'eps_low'"),
    "no parameters": ('{"ctpo": 3}', "^TOKENRL_VERL: ctpo: got 3, accepted: an object of parameters"),
    "no switch": ('{"fuse": 3}', "^TOKENRL_VERL: fuse: got 3, accepted: true or false"),
    "aggregation": ('{"ctpo": {"aggregation": "token-sum"}}', "^aggregation: got token-sum, accepted: verl's actor"),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_errors_of_the_variable_are_logged_where_verl_hides_them(name, core, monkeypatch, caplog):
    given, message = VARIABLES[name]
    monkeypatch.setenv("TOKENRL_VERL", given)
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=message) as raised:
        settings.install()
    assert caplog.messages == [f"tokenrl.integrations.verl is not loaded: {raised.value}"]


def test_errors_of_names(core):
    with pytest.raises(ValueError, match="^mode: got 'vanila', accepted: .*Did you mean 'vanilla'"):
        verl.replace("vanila")
    with pytest.raises(ValueError, match="^objective: got 'cptoo'"):
        verl.register("cptoo")
    core.POLICY_LOSS_REGISTRY["gpg"] = lambda log_prob, advantages: None
    with pytest.raises(ValueError, match=r"^verl's gpg: got the parameters \(log_prob, advantages\), accepted: \(old_"):
        verl.replace("gpg")


def test_replace_and_restore(core):
    before = dict(core.POLICY_LOSS_REGISTRY)
    for _ in range(2):
        verl.replace()
    assert [name for name in before if core.POLICY_LOSS_REGISTRY[name] is not before[name]] == [
        name for name in before if name in MODES
    ]
    verl.restore()
    assert core.POLICY_LOSS_REGISTRY == before


def test_versions(monkeypatch):
    monkeypatch.setattr(hosts, "version_of", lambda name: "0.6.0")
    with pytest.raises(
        ImportError, match="^verl: got 0.6.0, accepted: verl 0.6.1 to 0.9.1 for the losses and the head"
    ):
        settings.install()
    monkeypatch.setattr(hosts, "version_of", lambda name: "0.10.0")
    with pytest.warns(UserWarning, match="^verl: got 0.10.0, held to verl 0.6.1 to 0.9.1"):
        hosts.require("verl")
    monkeypatch.setattr(hosts, "version_of", lambda name: None)
    with pytest.raises(ImportError, match="^verl: got none, accepted: verl 0.6.1 to 0.9.1"):
        settings.install()


def test_the_version_of_a_checkout_is_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", type(sys)("verl"))
    assert hosts.version_of("verl") == hosts.metadata.version("verl")
    sys.modules["verl"].__version__ = "0.10.0.dev"
    assert hosts.version_of("verl") == "0.10.0.dev" and hosts.version_of("no such package") is None


def fresh_processes(*ways):
    """What verl finds in processes of its own; a way: (environment, external libraries)."""
    script = Path(verl_source.__file__).with_name("verl_process.py")
    ran = subprocess.run([sys.executable, script, json.dumps(ways)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    print("verl", found[0]["version"], "with stand-ins for", ", ".join(found[0]["stand-ins"]) or "nothing")
    return found


OWN = {f"tokenrl_{name}" for name in ROWS}


@pytest.mark.long
def test_the_plugin_in_fresh_processes():
    name, plugins = "tokenrl.integrations.verl", {"VERL_USE_EXTERNAL_PLUGINS": "none"}
    by_entry_point = [({"TOKENRL_VERL": '{"replace": true, "fuse": true, "patch": true}'}, [])]
    if not verl_source.loads_plugins():
        print(f"verl {verl_source.version()} has no entry points (0.9.0 and later do)")
        by_entry_point = []
    by_variable, by_library, *entered = fresh_processes(
        ({"VERL_USE_EXTERNAL_MODULES": name, **plugins}, []), (plugins, [name]), *by_entry_point
    )
    for found in (by_variable, by_library, *entered):
        assert found["loaded"] == (found is not by_library) and not (found["loaded"] and found["heavy"])
        assert set(found["modes"]) >= OWN
        replaced = [found["modes"][mode].startswith("tokenrl.") for mode in MODES if mode in found["modes"]]
        assert all(replaced) if found in entered else not any(replaced)
    for found in entered:
        assert (found["head"], found["logprobs"]) == ("tokenrl.integrations.verl.head", "tokenrl.compat.verl")


def test_the_example_s_settings_are_verl_s():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    config = yaml.safe_load((verl_source.folder() / "trainer/config/_generated_ppo_trainer.yaml").read_text())
    given = re.findall(r"^ +([\w.]+)=(\S+)", (ROOT / "examples/verl_ctpo.sh").read_text(), re.MULTILINE)
    for key, _ in given:
        found = config
        for name in key.split("."):
            assert name in found, key
            found = found[name]
    given = dict(given)
    row = tokenrl.OBJECTIVES[given["actor_rollout_ref.actor.policy_loss.loss_mode"].removeprefix("tokenrl_")]
    assert given["actor_rollout_ref.actor.loss_agg_mode"] == row.aggregation
