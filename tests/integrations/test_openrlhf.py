"""OpenRLHF's real PolicyLoss beside tokenrl's in its place."""

import itertools
import json
import re
import sys
from types import ModuleType

import host_source
import pytest
import torch
from host_source import batch, compared, lifted, with_gradient
from paths import ROOT

import tokenrl
from tokenrl.integrations import hosts, openrlhf

FOLDER = host_source.needed("openrlhf")
COUNTS = {"local": {}, "global": {"dp_size": 4, "batch_num_tokens": 117.0, "global_batch_size": torch.tensor(21.0)}}
PPO = {"clip_eps_high": 0.3}
GSPO = {"policy_loss_type": "gspo", "clip_eps_low": 0.05, "clip_eps_high": 0.08}
CASES = {
    "ppo": PPO, "dual": PPO | {"dual_clip": 1.5}, "sample mean": PPO | {"token_level_loss": False},
    "gspo": GSPO, "gspo dual": GSPO | {"dual_clip": 1.1},
    "gspo of the rollout": GSPO | {"is_correction_level": "token"},
    "TIS": PPO | {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": [0.8, 1.3]},
    "IcePop": PPO | {"is_correction_level": "token", "is_correction_threshold": [0.5, 1.3]},
    "no lower bound": PPO | {"is_correction_level": "token", "is_correction_threshold": [0.0, 1.3]},
    "seq-mask-tis": PPO | {"is_correction_level": "seq", "is_correction_threshold": [0.8, 1.1]},
    **{f"{gating} {level}": PPO | {"is_correction_level": level, "is_correction_gating": gating,
                                   "is_correction_threshold": [0.0, high]}
       for gating, level, high in (("binary_kl", "token", 0.003), ("binary_kl", "seq", 0.0065), ("tv", "token", 0.015),
                                   ("tv", "seq", 0.024))},
}  # fmt: skip


@pytest.fixture
def host(monkeypatch):
    """openrlhf.models.loss, and a module that has imported from it, as if they were imported."""
    monkeypatch.setattr(hosts, "version_of", lambda name: host_source.version("openrlhf"))
    mean = lifted(FOLDER / "models/utils.py", "masked_mean")
    module = lifted(
        FOLDER / "models/loss.py", "aggregate_loss", "PolicyLoss", nn=torch.nn, masked_mean=mean.masked_mean
    )
    actor = ModuleType("openrlhf.trainer.ray.ppo_actor")
    actor.PolicyLoss = module.PolicyLoss
    for name, loaded in ((openrlhf.LOSS, module), (actor.__name__, actor)):
        monkeypatch.setitem(sys.modules, name, loaded)
    return module


@pytest.fixture
def pair(host):
    """(OpenRLHF's class, ours)"""
    theirs = host.PolicyLoss
    for _ in range(2):
        openrlhf.use()
    ours = host.PolicyLoss
    assert issubclass(ours, theirs) and sys.modules["openrlhf.trainer.ray.ppo_actor"].PolicyLoss is ours
    assert ours.__mro__.count(openrlhf.TokenRLLoss) == 1
    return theirs, ours


def evaluated(loss, given, **counts):
    logp, old, rollout, advantages, mask = given
    return with_gradient(
        lambda logp: loss(logp, old, advantages, action_mask=mask, rollout_log_probs=rollout, **counts), logp
    )


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_openrlhf(name, pair):
    # What is left is OpenRLHF's own: it adds 1e-8 to a sample's count.
    limit = 2e-8 if "sample" in name or "gspo" in name else 1e-12
    for seed, (counts, per_token) in enumerate(itertools.product(COUNTS, (False, True))):
        theirs, ours = (kind(**CASES[name]) for kind in pair)
        given = batch(seed, per_token=per_token)
        truth, found = (evaluated(loss, given, **COUNTS[counts]) for loss in (theirs, ours))
        assert max(compared(truth[:2], found[:2])) < limit
        assert len(found[2]) == len(truth[2]) == 4
        for value, expected in zip(found[2], truth[2], strict=True):
            assert (value is None) == (expected is None)
            if value is not None:
                torch.testing.assert_close(value.double(), expected.double(), rtol=1e-6, atol=1e-7)
        assert truth[2][3] is None or 0 < truth[2][3] < 1  # some of it is filtered


@pytest.mark.parametrize("name", ["ppo", "dual"])
def test_beyond_20_nats_the_ratio_has_no_gradient_in_either(name, pair):
    theirs, ours = (kind(**CASES[name]) for kind in pair)
    logp, old, rollout, advantages, mask = batch(7)
    given = logp, logp - 30 * (torch.rand(logp.shape, generator=torch.Generator().manual_seed(0)) - 0.5).sign() - 3, \
        rollout, advantages, mask  # fmt: skip
    truth, found = (evaluated(loss, given) for loss in (theirs, ours))
    assert max(compared(truth[:2], found[:2])) < 1e-12


def test_without_a_mask_every_token_counts(pair):
    logp, *rest, _ = batch(3)
    truth = evaluated(pair[0](**PPO), (logp, *rest, torch.ones_like(logp, dtype=torch.bool)))
    found = evaluated(pair[1](**PPO), (logp, *rest, None))
    assert max(compared(truth[:2], found[:2])) < 1e-12
    assert [x.item() for x in found[2][:2]] == pytest.approx([x.item() for x in truth[2][:2]])


def test_a_row_of_the_table(pair, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, json.dumps({"ctpo": {"eps_low": 0.03}}))
    ours, given = pair[1](token_level_loss=False, clip_eps_low=0.5), batch(4)
    logp, old, _, advantages, mask = given
    found = evaluated(ours, given, **COUNTS["global"])
    row = tokenrl.objective("ctpo", eps_low=0.03)
    truth = with_gradient(
        lambda x: tokenrl.policy_loss(
            row, x, old, advantages, mask=mask, aggregation="seq-mean-token-mean", normalizer=21 / 4
        ), logp,
    )  # fmt: skip
    assert torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1])
    metrics = truth[2][0]
    torch.testing.assert_close(found[2][0].item(), metrics.clip_low + metrics.clip_high)
    assert not torch.equal(found[0], evaluated(pair[0](token_level_loss=False), given, **COUNTS["global"])[0])


def test_rows_of_ppo_take_openrlhf_s_bounds(pair, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, '{"dapo": {"eps_high": 0.7}}')
    gate = pair[1](clip_eps_low=0.1, clip_eps_high=0.5, dual_clip=4.0).row().gate
    assert (gate.eps_low, gate.eps_high, gate.dual) == (0.1, 0.7, 4.0)


REFUSED = {
    "ba": "^objective: got 'ba', which needs group ids, accepted: a row of what openrlhf hands to a policy loss",
    "kl_k3": "^objective: got 'kl_k3', which needs a reference's log-probs",
    "cptoo": "^TOKENRL_OBJECTIVE: got 'cptoo', .*Did you mean 'ctpo'",
    '{"ctpo": {"eps_lo": 1}}': "^parameter of 'ctpo': got 'eps_lo', .*Did you mean 'eps_low'",
    '{"ctpo": {}, "ppo": {}}': "^TOKENRL_OBJECTIVE: got {.*, accepted: a name of tokenrl.OBJECTIVES, or a JSON object",
    "{ctpo": "^TOKENRL_OBJECTIVE: got {ctpo, accepted: a name",
    '{"ctpo": 3}': "^TOKENRL_OBJECTIVE: got .*, accepted: a name",
    '{"ctpo": {"aggregation": "token-mean"}}': "^TOKENRL_OBJECTIVE: .*; the aggregation is openrlhf's",
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_train_is_refused_before(given, host, monkeypatch):
    monkeypatch.setenv(hosts.VARIABLE, given)
    with pytest.raises(ValueError, match=REFUSED[given]):
        openrlhf.use()


def test_versions_and_signatures(host, monkeypatch):
    forward = host.PolicyLoss.forward
    monkeypatch.setattr(host.PolicyLoss, "forward", lambda self, log_probs, advantages: None)
    with pytest.raises(ValueError, match=r"^openrlhf.models.PolicyLoss.forward: got the parameters \(self, log_probs"):
        openrlhf.use()
    monkeypatch.setattr(host.PolicyLoss, "forward", forward)
    for found, message in ((None, "got none"), ("0.11.1", "got 0.11.1")):
        monkeypatch.setattr(hosts, "version_of", lambda name, found=found: found)
        with pytest.raises(ImportError, match=f"^openrlhf: {message}, accepted: openrlhf 0.11.2 to 0.11.2 for"):
            openrlhf.use()


def test_the_launcher_hooks_ray_s_workers(host, monkeypatch):
    """Its own runtime_env stays; a hook of another's is no place to hide ours behind."""
    ray, started, ran = ModuleType("ray"), [], []
    ray.init = lambda **kwargs: started.append(kwargs)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv(hosts.VARIABLE, "ctpo")
    monkeypatch.setattr(openrlhf.runpy, "run_module", lambda *args, **kwargs: ran.append((args, kwargs)))
    openrlhf.main()
    assert ran == [(("openrlhf.cli.train_ppo_ray",), {"run_name": "__main__", "alter_sys": True})]
    ray.init(runtime_env={"env_vars": {"NCCL_DEBUG": "WARN"}}, address="auto")
    variables = {"NCCL_DEBUG": "WARN", hosts.VARIABLE: "ctpo"}
    env = {"env_vars": variables, "worker_process_setup_hook": openrlhf.HOOK}
    assert started == [{"address": "auto", "runtime_env": env}]
    module, _, name = openrlhf.HOOK.rpartition(".")
    assert getattr(sys.modules[module], name) is openrlhf.use
    with pytest.raises(ValueError, match="^worker_process_setup_hook: got mine, accepted: none beside tokenrl"):
        ray.init(runtime_env={"worker_process_setup_hook": "mine"})
    assert (FOLDER / "cli/train_ppo_ray.py").is_file()


def test_the_example_s_arguments_are_openrlhf_s():
    example, cli = (path.read_text() for path in (ROOT / "examples/openrlhf_ctpo.sh", FOLDER / "cli/train_ppo_ray.py"))
    for name in re.findall(r"^ +(--[\w.]+)", example, re.MULTILINE):
        assert f'"{name}"' in cli, name
    chosen = re.search(r"OBJECTIVE='(.*)'", example)[1]
    (row,) = json.loads(chosen)
    assert f"--actor.loss_agg_mode {tokenrl.OBJECTIVES[row].aggregation}" in example
