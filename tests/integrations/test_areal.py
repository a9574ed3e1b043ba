"""AReaL's real losses, lifted from the wheel, beside tokenrl's in their place."""

import dataclasses
import itertools
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import host_source
import pytest
import torch
from host_source import batch, compared, lifted, methods, with_gradient
from paths import ROOT

import tokenrl
from tokenrl.integrations import areal, hosts

FOLDER = host_source.needed("areal")
REJECTIONS = [
    {"level": level, "action": action, "metric": metric, "agg": agg, "lower": lower, "upper": upper}
    for (level, agg, scale), action, (metric, lower, upper) in itertools.product(
        (("token", "sum", 1), ("sequence", "mean", 1), ("sequence", "max", 1.5)), ("mask", "clamp"),
        (("ratio", 0.8, 1.2), ("ratio", None, 1.1), ("kl_k3", None, 0.06)))
    for upper in [upper * scale ** (1 if metric == "ratio" else 5)]
]  # fmt: skip
PPO = {"eps_clip": 0.2}
CASES = {
    "ppo": PPO, "higher": PPO | {"eps_clip_higher": 0.4}, "dual": PPO | {"c_clip": 1.5},
    "sequence": {"eps_clip": 0.05, "importance_sampling_level": "sequence"},
    "sequence dual": {"eps_clip": 0.05, "importance_sampling_level": "sequence", "c_clip": 1.1},
}  # fmt: skip
SAPO = {"tau_pos": 1.0, "tau_neg": 1.3}


@pytest.fixture
def host(monkeypatch):
    """areal.utils.functional.functional, and the module that trains with it, as if they were imported."""
    monkeypatch.setattr(hosts, "version_of", lambda name: host_source.version("areal"))
    monkeypatch.setattr(areal.metadata, "requires", lambda name: ["numpy", "torch>=2.9.1"])
    monkeypatch.setattr(areal, "CHOICE", hosts.Choice("areal"))
    kl = methods(FOLDER / "utils/data.py", "KLEstimator", "_compute_approx_kl")
    kl._compute_approx_kl = staticmethod(kl._compute_approx_kl)
    module = lifted(
        FOLDER / "utils/functional/functional.py", "_compute_sequence_level_ratio_and_advantages",
        "RejectionSamplingResult", "_check_bounds", "apply_rejection_sampling", "ppo_actor_loss_fn", "sapo_loss_fn",
        dataclass=dataclasses.dataclass, Any=Any, KLEstimator=kl,
    )  # fmt: skip
    actor = ModuleType("areal.trainer.ppo.actor")
    for name in areal.STAND_INS:
        setattr(actor, name, getattr(module, name))
    for name, loaded in ((areal.FUNCTIONS, module), (actor.__name__, actor)):
        monkeypatch.setitem(sys.modules, name, loaded)
    return module


@pytest.fixture
def pairs(host):
    """By name (AReaL's function, ours in its place where AReaL trains)."""
    theirs = {name: getattr(host, name) for name in areal.STAND_INS}
    for _ in range(2):
        areal.use()
    actor = sys.modules["areal.trainer.ppo.actor"]
    return {name: (found, getattr(actor, name)) for name, found in theirs.items()}


def inputs(seed, packed):
    """As AReaL hands them over: padded, or packed without the cells of a short row's end."""
    names = "logprobs", "proximal_logprobs", "old_logprobs", "advantages", "loss_mask"
    given = dict(zip(names, batch(seed, per_token=seed % 2 == 1), strict=True))
    if not packed:
        return given | {"cu_seqlens": None}
    lengths = [9, 4, 7, 9, 1, 6]
    kept = torch.arange(9) < torch.tensor(lengths)[:, None]
    packed = {key: x[kept] for key, x in given.items()}
    return packed | {"cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)}


def evaluated(loss, given, **options):
    given = dict(given)
    logp = given.pop("logprobs")
    return with_gradient(lambda x: loss(logprobs=x, **given, **options), logp)


def check(pair, given, **options):
    truth, found = (evaluated(loss, given, **options) for loss in pair)
    assert max(compared(truth[:2], found[:2])) < 1e-12
    for key, value in truth[2][0].items():
        same = found[2][0][key]
        assert torch.equal(same, value) if isinstance(value, torch.Tensor) else same == value, key
        assert not getattr(same, "requires_grad", False)
    return truth


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_areal(case, packed, pairs):
    for seed in range(4):
        check(pairs["ppo_actor_loss_fn"], inputs(seed, packed), **CASES[case])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rejection", REJECTIONS, ids=lambda r: " ".join(map(str, r.values())))
def test_rejection_of_the_rollout_s_tokens(rejection, packed, pairs):
    for level in ("token", "sequence"):
        options = {"rejection_sampling": SimpleNamespace(**rejection), "importance_sampling_level": level}
        truth = check(pairs["ppo_actor_loss_fn"], inputs(3, packed), **PPO, **options)
        assert rejection["action"] == "clamp" or 0 < truth[2][0]["filtered_fraction"] < 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sapo(level, packed, pairs):
    for seed in range(4):
        given = inputs(seed, packed)
        del given["proximal_logprobs"]
        check(pairs["sapo_loss_fn"], given, **SAPO, importance_sampling_level=level)


def test_nothing_valid(pairs):
    given = inputs(0, True)
    given["loss_mask"] = torch.zeros_like(given["loss_mask"])
    loss, grad, _ = evaluated(pairs["ppo_actor_loss_fn"][1], given, **PPO)
    assert loss == 0 and not grad.any()


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_row_of_the_table(level, pairs, monkeypatch):
    """Under AReaL's count and rejection; the level is of AReaL's own losses."""
    areal.use("ctpo", eps_low=0.03)
    given, loss = inputs(5, True), pairs["ppo_actor_loss_fn"][1]
    rejection = SimpleNamespace(level="token", action="mask", metric="ratio", agg="mean", lower=0.6, upper=1.5)
    found = evaluated(loss, given, **PPO, rejection_sampling=rejection, importance_sampling_level=level)
    ratio = (given["proximal_logprobs"].float() - given["old_logprobs"].float()).exp()
    kept = given["loss_mask"] & (ratio >= 0.6) & (ratio <= 1.5)
    truth = with_gradient(
        lambda x: tokenrl.policy_loss(
            tokenrl.objective("ctpo", eps_low=0.03), x, given["proximal_logprobs"], given["advantages"], mask=kept,
            cu_seqlens=given["cu_seqlens"].long(), advantages_per="token", token_weight=ratio,
            aggregation="token-mean", normalizer=given["loss_mask"].sum(),
        ), given["logprobs"],
    )  # fmt: skip
    assert max(compared(truth[:2], found[:2])) < 1e-12
    stat, metrics = found[2][0], truth[2][0]
    assert stat["clip_mask"].sum() == (metrics.clip_low + metrics.clip_high) * metrics.tokens > 0
    assert stat["dual_clip_mask"].sum() == metrics.clip_dual * metrics.tokens
    assert stat["importance_weight"][kept].mean().item() == pytest.approx(metrics.ratio_mean)
    assert (stat["loss"] == found[0]).all() and "behave_imp_weight" in stat and not stat["loss"].requires_grad
    monkeypatch.setenv(hosts.VARIABLE, '{"ctpo": {"eps_low": 0.03}}')
    areal.use()
    assert torch.equal(evaluated(loss, given, **PPO, rejection_sampling=rejection)[0], found[0])


def test_rows_take_areal_s_bounds(pairs, monkeypatch):
    seen = []
    monkeypatch.setattr(areal, "evaluate", lambda row, *args: seen.append(row))
    areal.use("dapo", eps_high=0.7)
    pairs["ppo_actor_loss_fn"][1](**inputs(0, True), eps_clip=0.1, c_clip=3.0)
    assert (seen[0].gate.eps_low, seen[0].gate.eps_high, seen[0].gate.dual) == (0.1, 0.7, 3.0)


def test_what_cannot_train_is_refused_before(host, monkeypatch):
    with pytest.raises(ValueError, match="^objective: got 'ba', which needs group ids, accepted: a row of what areal"):
        areal.use("ba")
    monkeypatch.setattr(host, "sapo_loss_fn", lambda logprobs, mask: None)
    with pytest.raises(ValueError, match=r"^AReaL's sapo_loss_fn: got the parameters \(logprobs, mask\)"):
        areal.use()
    # What AReaL 1.0.4 says.
    asked = [line.removeprefix("Requires-Dist: ") for line in metadata_text().splitlines() if "Requires-Dist" in line]
    monkeypatch.setattr(areal.metadata, "requires", lambda name: asked)
    with pytest.raises(ImportError, match=r"^torch: got .*, accepted: torch<2.11,>=2.9.1, which AReaL asks for"):
        areal.use()
    monkeypatch.setattr(hosts, "version_of", lambda name: "1.0.3")
    with pytest.raises(ImportError, match="^areal: got 1.0.3, accepted: areal 1.0.4 to 1.0.4 for the losses"):
        areal.use()


def metadata_text():
    (found,) = host_source.HOSTS.glob("areal-*.dist-info")
    return (found / "METADATA").read_text()


def test_the_example_uses_it(host):
    example = (ROOT / "examples/areal_ctpo.py").read_text()
    head = example[: example.index("from areal")]
    exec(head, {})
    assert areal.CHOICE.name == "ctpo"
