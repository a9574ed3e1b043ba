"""SkyRL's real policy losses and its registry beside tokenrl's."""

import dataclasses
import enum
import functools
import itertools
import pickle
import re
import sys
from types import ModuleType
from typing import Any, Optional

import host_source
import pytest
import torch
from host_source import batch, compared, lifted, with_gradient
from paths import ROOT

import tokenrl
from tokenrl.integrations import hosts, skyrl

pytestmark = pytest.mark.filterwarnings("ignore:tokenrl_.* the method's own is")
FOLDER = host_source.needed("skyrl")
UTILS = FOLDER / "backends/skyrl_train/utils"
LOSSES = {  # of SkyRL: ours
    "regular": "ppo", "dual_clip": "dual_clip", "gspo": "gspo_token", "sapo": "sapo", "cispo": "cispo",
    "importance_sampling": "ratio",
}  # fmt: skip
FUNCTIONS = (
    "ppo_policy_loss", "sapo_policy_loss", "gspo_policy_loss", "compute_policy_loss_cispo", "importance_sampling_loss",
)  # fmt: skip
CORRECTIONS = {
    "none": {}, "TIS": {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.2},
    "sequence TIS": {"tis_ratio_type": "sequence", "sequence_tis_ratio_clip_high": 1.5},
    "geometric": {"sequence_mask_metric": "geometric", "geo_mask_low": 0.8, "geo_mask_high": 1.1},
    "outliers": {"outlier_token_is_threshold_high": 2.0, "tis_ratio_type": "token"},
    "tokens": {"token_mask_is_threshold_low": 0.7, "token_mask_is_threshold_high": 1.4},
}  # fmt: skip


@functools.cache
def configs():
    names = ("KLCtrlConfig", "SAPOConfig", "DynamicSamplingConfig", "ClipCovConfig", "KLCovConfig", "CISPOConfig",
             "DPPOConfig", "OffPolicyCorrectionConfig", "AlgorithmConfig")  # fmt: skip
    known = {"dataclass": dataclasses.dataclass, "field": dataclasses.field, "BaseConfig": object, "Optional": Optional}
    return lifted(FOLDER / "train/config/config.py", *names, Any=Any, **known)


def config(correction="none", **options):
    made = configs()
    given = made.OffPolicyCorrectionConfig(**CORRECTIONS[correction])
    given = made.AlgorithmConfig(
        eps_clip_high=0.3, clip_ratio_c=1.5, sapo=made.SAPOConfig(tau_neg=1.3), off_policy_correction=given, **options
    )
    given.cispo = made.CISPOConfig(cispo_eps_clip_low=0.1, cispo_eps_clip_high=0.4)
    return given


@pytest.fixture
def core(monkeypatch):
    """SkyRL's ppo_utils as if it were imported, and its registry without Ray."""
    monkeypatch.setattr(hosts, "version_of", lambda name: host_source.version("skyrl"))
    small = lifted(UTILS / "torch_utils.py", "masked_mean", "safe_exp_delta")
    known = {"masked_mean": small.masked_mean, "safe_exp_delta": small.safe_exp_delta}
    correction = lifted(
        UTILS / "off_policy_correction_utils.py", "off_policy_correction_enabled", "compute_tis_ratio",
        "compute_outlier_token_mask", "compute_token_mask", "compute_sequence_mask", "compute_off_policy_correction",
        "apply_off_policy_correction", **known,
    )  # fmt: skip
    ray = ModuleType("ray")
    ray.is_initialized = lambda: False
    monkeypatch.setitem(sys.modules, "loguru", ModuleType("loguru"))
    sys.modules["loguru"].logger = type("Logger", (), {"warning": staticmethod(lambda text: None)})
    module = lifted(
        UTILS / "ppo_utils.py", "BaseFunctionRegistry", "PolicyLossType", "PolicyLossRegistry", "register_policy_loss",
        "reduce_loss", "apply_loss_reduction_to_advantages_minibatch", *FUNCTIONS, ray=ray, wraps=functools.wraps,
        StrEnum=enum.Enum if not hasattr(enum, "StrEnum") else enum.StrEnum,
        apply_off_policy_correction=correction.apply_off_policy_correction, **known,
    )  # fmt: skip
    for name, loaded in (("ppo_utils", module), ("off_policy_correction_utils", correction)):
        monkeypatch.setitem(sys.modules, f"{skyrl.UTILS}.{name}", loaded)
    return module


@pytest.fixture
def registry(core):
    for _ in range(2):
        skyrl.register()
    return core.PolicyLossRegistry


def evaluated(loss, logp, *rest, **given):
    return with_gradient(lambda x: loss(x, *rest, **given), logp)


def scaled(core, reduction, advantages, mask):
    """The advantages of a minibatch of two micro-batches, as SkyRL's trainer hands them to its loss."""
    boundaries = [(0, 2), (2, 6)]
    return core.apply_loss_reduction_to_advantages_minibatch(advantages, mask, reduction, 3, mask.shape[1], boundaries)


@pytest.mark.parametrize("name", LOSSES)
def test_the_numbers_are_those_of_skyrl(name, core, registry):
    theirs, ours = registry.get(name), registry.get(f"tokenrl_{LOSSES[name]}")
    kinds = CORRECTIONS if name != "importance_sampling" else ["none"]  # which takes none of them
    for seed, (reduction, correction, part) in enumerate(
        itertools.product(skyrl.REDUCTIONS, kinds, (slice(0, 3), slice(3, 6)))
    ):
        logp, old, rollout, advantages, mask = batch(seed % 7, per_token=seed % 2 == 1)
        advantages = scaled(core, reduction, advantages, mask)[part]
        given = {"config": config(correction, loss_reduction=reduction, policy_loss_type=name)}
        given |= {"loss_mask": mask[part].to(torch.float), "rollout_logprobs": rollout[part]}
        truth, found = (evaluated(loss, logp[part], old[part], advantages, **given) for loss in (theirs, ours))
        # SkyRL exponentiates in fp32.
        assert max(compared(truth[:2], found[:2])) < 3e-7, (reduction, correction)
        expected = {key: value for key, value in truth[2][0].items() if key != "importance_ratio"}
        assert {key: found[2][0][key] for key in expected} == pytest.approx(expected, rel=1e-6)
        assert 0 < found[2][0]["tokenrl/ess"] <= 1


@pytest.mark.parametrize("name", ["ctpo", "vespo", "fipo", "cppo"])
def test_a_row_with_the_normaliser_in_its_advantages(name, registry):
    """Is the row under the normaliser."""
    logp, old, _, advantages, mask = batch(3)
    given = {"config": config(loss_reduction="sequence_mean"), "loss_mask": mask.float()}
    n = 6 * mask.sum(1, keepdim=True)
    found = evaluated(registry.get(f"tokenrl_{name}"), logp, old, advantages / n, **given)
    truth = with_gradient(
        lambda x: tokenrl.policy_loss(name, x, old, advantages, mask=mask, aggregation="seq-mean-token-mean"), logp
    )
    assert max(compared(truth[:2], found[:2])) < 1e-12
    metrics = truth[2][0]
    assert found[2][0] == pytest.approx(
        {"clip_ratio": metrics.clip_low + metrics.clip_high, "tokenrl/ess": metrics.ess,
         "tokenrl/ratio_max": metrics.ratio_max})  # fmt: skip


def test_without_mask_and_without_tokens(registry):
    logp, old, _, advantages, _ = batch(5)
    loss, given = registry.get("tokenrl_ppo"), {"config": config()}
    found = evaluated(loss, logp, old, advantages, **given)
    truth = evaluated(loss, logp, old, advantages, **given, loss_mask=torch.ones_like(logp))
    assert torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1])
    value, grad, (metrics,) = evaluated(loss, logp, old, advantages, **given, loss_mask=torch.zeros_like(logp))
    assert value == 0 and not grad.any() and set(metrics.values()) == {0.0}


def test_settings_and_the_variable(core, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, '{"dapo": {"eps_high": 0.7}}')
    skyrl.register()
    table = core.PolicyLossRegistry
    gates = {name: table.get(f"tokenrl_{name}").row(config()).gate for name in ("dapo", "ppo", "ctpo")}
    assert (gates["dapo"].eps_low, gates["dapo"].eps_high) == (0.2, 0.7)
    assert (gates["ppo"].eps_high, gates["ctpo"].eps_high) == (0.3, 0.05)
    loss = pickle.loads(pickle.dumps(table.get("tokenrl_dapo")))  # as Ray's workers get it
    assert loss.row(config()).gate.eps_high == 0.7


def test_another_reduction_than_the_method_s_is_named(registry):
    logp, old, _, advantages, mask = batch(0)
    with pytest.warns(UserWarning, match="^tokenrl_minpro: loss_reduction 'prompt_mean', the method's own is"):
        registry.get("tokenrl_minpro")(
            logp, old, advantages, config=config(loss_reduction="prompt_mean"), loss_mask=mask.float()
        )


REFUSED = {
    "dro": "^policy_loss_type: got 'dro', accepted: rows that are linear in the advantages",
    "ba": "^policy_loss_type: got 'ba', which needs group ids, accepted: a row of what SkyRL hands to its loss",
    "cptoo": "^objective: got 'cptoo', .*Did you mean 'ctpo'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_is_refused_before(name, core, registry, monkeypatch):
    argument = f"trainer.algorithm.policy_loss_type=tokenrl_{name}"
    monkeypatch.setattr(sys, "argv", ["main_base", argument])
    with pytest.raises(ValueError, match=REFUSED[name]):
        skyrl.main()
    if name != "cptoo":
        with pytest.raises(ValueError, match=REFUSED[name]):
            registry.get(f"tokenrl_{name}")(*batch(0)[:2], batch(0)[3], config=config())


def test_the_entry_point_goes_on_to_skyrl_s(core, monkeypatch):
    seen, main = [], ModuleType(skyrl.MAIN)
    main.main = lambda: seen.append(sys.argv[1:])
    monkeypatch.setitem(sys.modules, skyrl.MAIN, main)
    kept = ["trainer.algorithm.policy_loss_type=tokenrl_ctpo", "trainer.epochs=1"]
    monkeypatch.setattr(sys, "argv", ["main_base", "trainer.override_entrypoint=tokenrl.integrations.skyrl", *kept])
    skyrl.main()
    assert seen == [kept] and "tokenrl_ctpo" in core.PolicyLossRegistry.list_available()
    text = (FOLDER / "train/entrypoints/main_base.py").read_text()
    assert '"trainer.override_entrypoint="' in text and "import_module(override_entrypoint).main()" in text


def test_versions_and_signatures(core, monkeypatch):
    core.PolicyLossRegistry._functions["regular"] = lambda old_log_probs, log_probs: None
    with pytest.raises(ValueError, match=r"^SkyRL's loss 'regular': got the parameters \(old_log_probs, log_probs\)"):
        skyrl.register()
    monkeypatch.setattr(hosts, "version_of", lambda name: "0.2.0")
    with pytest.raises(ImportError, match="^skyrl: got 0.2.0, accepted: skyrl 0.3.0 to 0.3.0 for the losses"):
        skyrl.register()


def test_the_example_s_settings_are_skyrl_s():
    example = (ROOT / "examples/skyrl_ctpo.sh").read_text()
    given = dict(re.findall(r"^ +trainer\.algorithm\.(\w+)=(\S+)", example, re.MULTILINE))
    fields = {f.name for f in dataclasses.fields(configs().AlgorithmConfig)}
    assert given.keys() <= fields
    row = tokenrl.OBJECTIVES[given["policy_loss_type"].removeprefix("tokenrl_")]
    assert skyrl.REDUCTIONS[given["loss_reduction"]] == row.aggregation
