"""ms-swift's real GRPO loss, its methods lifted from the wheel, beside tokenrl's in its place."""

import collections
import itertools
import sys
from types import ModuleType, SimpleNamespace

import host_source
import pytest
import torch
from host_source import batch, compared, methods, with_gradient
from paths import ROOT

import tokenrl
from tokenrl.integrations import hosts, swift

FOLDER = host_source.needed("swift")
FILE = FOLDER / "rlhf_trainers/grpo_trainer.py"
WINDOW = ["cispo", "dapo", "fipo"]
METHODS = (
    "_compute_loss_and_metrics", "_undo_gradient_accumulation_scaling", "_get_rollout_is_correction",
    "_apply_rollout_importance_sampling", "_compute_sequence_level_ratios", "_compute_off_policy_sequence_mask",
    "_compute_fipo_influence", "_compute_rollout_offpolicy_metrics", "_compute_is_correction_metrics",
    "_prepare_algorithm_params",
)  # fmt: skip
ARGUMENTS = {  # ms-swift's, in their defaults but where a test says otherwise
    "dataset_shuffle": True, "loss_type": "grpo", "scale_rewards": "group", "num_iterations": 1, "epsilon": 0.2,
    "epsilon_high": 0.3, "dynamic_sample": False, "max_resample_times": 3, "overlong_filter": False,
    "top_entropy_quantile": 1.0, "importance_sampling_level": "token", "tau_pos": 1.0, "tau_neg": 1.3, "real_tau": 0.5,
    "fipo_decay_rate": 32.0, "fipo_clip_range": 0.2, "fipo_clip_high_only": False, "fipo_safety_threshold": 4.0,
    "advantage_estimator": "grpo", "kl_in_reward": False, "rollout_importance_sampling_mode": None,
    "rollout_importance_sampling_threshold": 1.3, "log_rollout_offpolicy_metrics": False,
    "off_policy_sequence_mask_delta": None, "advantage_reweight": None, "rlsd_lambda": 0.0,
    "rlsd_reweight_clip_range": 0.0, "rlsd_lambda_warmup_steps": 0, "rlsd_lambda_decay_steps": 0,
    "rlsd_negative_only": False, "sdar_loss_coef": 0.0, "sdar_gate_beta": 1.0, "delta": None, "log_entropy": False,
    "use_liger_kernel": False, "gradient_accumulation_steps": 3,
}  # fmt: skip
KINDS = {
    "grpo": {}, "bnpo": {}, "dr_grpo": {}, "dapo": {}, "cispo": {"epsilon_high": 2.0}, "sapo": {}, "real": {},
    "fipo": {"delta": 3.0, "fipo_decay_rate": 4.0}, "fipo unbounded": {"fipo_clip_range": None},
    "fipo up": {"fipo_clip_high_only": True},
}  # fmt: skip
OPTIONS = {
    "plain": {}, "sequence": {"importance_sampling_level": "sequence"},
    "sequence_token": {"importance_sampling_level": "sequence_token"}, "beta": {"beta": 0.1},
    "delta": {"delta": 1.5}, "delta below": {"delta": 1.05},
    **{mode: {"rollout_importance_sampling_mode": mode, "beta": 0.1}
       for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")},
    "entropy": {"top_entropy_quantile": 0.5, "beta": 0.1, "rollout_importance_sampling_mode": "token_truncate"},
    "off-policy": {"off_policy_sequence_mask_delta": 0.02}, "overlong": {"overlong_filter": True},
    "kl in reward": {"beta": 0.1, "kl_in_reward": True}, "on-policy": {"old": None, "beta": 0.1},
}  # fmt: skip


@pytest.fixture
def host(monkeypatch):
    """ms-swift's GRPOTrainer, of the methods above, as if its module were imported."""
    monkeypatch.setattr(hosts, "version_of", lambda name: host_source.version(name.replace("-", "_")))
    known = {"gather": lambda x: x, "gather_object": lambda x: x, "nanmin": torch.min, "nanmax": torch.max,
             "WINDOW_NORMALIZED_LOSS_TYPES": WINDOW}  # fmt: skip
    assert f"WINDOW_NORMALIZED_LOSS_TYPES = {WINDOW}" in FILE.read_text()
    module = ModuleType(swift.TRAINER)
    module.GRPOTrainer = methods(FILE, "GRPOTrainer", *METHODS, **known)
    monkeypatch.setitem(sys.modules, swift.TRAINER, module)
    return module


def trainer_of(kind, beta=0.0, chord_sft_dataset=None, **arguments):
    """An instance, with what other methods would have set."""
    made = object.__new__(kind)
    made.args = SimpleNamespace(**ARGUMENTS | arguments)
    made.chord_sft_dataset, made.beta = chord_sft_dataset, beta
    made._prepare_algorithm_params()
    vars(made).update(
        model=SimpleNamespace(training=True), compute_entropy=made.top_entropy_quantile < 1.0, _has_teacher=False,
        disable_rollout_importance_sampling=False, chord_sft_iterator=None, max_completion_length=17,
        num_generations=3, model_accepts_loss_kwargs=False, compute_loss_func=None,
        _metrics={"train": collections.defaultdict(list)},
        accelerator=SimpleNamespace(num_processes=2, gather_for_metrics=lambda x: x),
    )  # fmt: skip
    return made


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setattr(swift, "CHOICE", hosts.Choice("swift"))


def evaluated(trainer, seed, old=True):
    logp, old_logp, rollout, advantages, mask = batch(seed)
    g = torch.Generator().manual_seed(seed)
    entropies = torch.rand(logp.shape, generator=g, dtype=torch.float64)
    rolled = trainer.rollout_importance_sampling_mode or trainer.off_policy_sequence_mask_delta is not None
    given = SimpleNamespace(
        completion_mask=mask, truncated_mask=torch.tensor([False, True, False, False, False, False]),
        advantages=advantages, old_per_token_logps=old_logp if old else None, ref_per_token_logps=batch(seed + 50)[1],
        rollout_per_token_logps=rollout if rolled else None, num_items_in_batch=torch.tensor(151),
        teacher_per_token_logps=None,
    )  # fmt: skip

    def loss(x):
        trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (x, entropies)
        try:
            return trainer._compute_loss_and_metrics(None, {}, given)
        finally:
            vars(trainer).pop("_get_per_token_logps_and_entropies", None)

    return with_gradient(loss, logp)


def cases():
    for kind, option in itertools.product(KINDS, OPTIONS):
        unsuited = {"fipo": ("sequence", "sequence_token", "delta", "delta below"), "cispo": ("delta", "delta below"),
                    "real": ("off-policy", "overlong", "kl in reward")}  # fmt: skip
        if option not in unsuited.get(kind.split()[0], ()):
            yield pytest.param(kind, option, id=f"{kind}-{option}")


@pytest.mark.parametrize("kind,option", list(cases()))
def test_the_numbers_are_those_of_ms_swift(kind, option, host):
    options = {"loss_type": kind.split()[0]} | KINDS[kind] | OPTIONS[option]
    old = options.pop("old", True)
    theirs = evaluated(trainer_of(host.GRPOTrainer, **options), 1, old)
    for _ in range(2):
        swift.use()
    trainer = trainer_of(host.GRPOTrainer, **options)
    found = evaluated(trainer, 1, old)
    assert max(compared(theirs[:2], found[:2])) < 1e-9
    assert torch.equal(found[2][0].pop("completion_mask"), theirs[2][0].pop("completion_mask"))
    assert flat(found[2][0]) == pytest.approx(flat(theirs[2][0]))
    assert trainer._metrics["train"]["tokenrl/ess"]


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_row_of_the_table(level, host, monkeypatch):
    """Under the aggregation, the KL and the correction of ms-swift; the level is the row's own."""
    swift.use("ctpo", eps_low=0.03)
    options = {"loss_type": "grpo", "beta": 0.1, "rollout_importance_sampling_mode": "token_truncate"}
    trainer = trainer_of(host.GRPOTrainer, importance_sampling_level=level, **options)
    loss, grad, (metrics,) = evaluated(trainer, 3)
    logp, old, rollout, advantages, mask = batch(3)
    truth = with_gradient(
        lambda x: tokenrl.policy_loss(
            tokenrl.objective("ctpo", eps_low=0.03), x, old, advantages, mask=mask, aggregation="seq-mean-token-mean",
            rollout_logp=rollout, correction={"bound": "truncate", "high": 1.3}, ref_logp=batch(53)[1], kl=swift.K3,
            kl_coef=0.1,
        ), logp,
    )  # fmt: skip
    assert max(compared(truth[:2], (loss, grad))) < 1e-12
    assert "clipping" not in metrics and "kl" in metrics
    assert trainer._metrics["train"]["tokenrl/clip_low"] == [pytest.approx(truth[2][0].clip_low)]
    monkeypatch.setenv(hosts.VARIABLE, '{"ctpo": {"eps_low": 0.03}}')
    swift.use()
    assert torch.equal(evaluated(trainer, 3)[0], loss)


def test_rows_take_ms_swift_s_bounds(host):
    swift.use("dapo", eps_low=0.1)
    gate = swift.CHOICE.row(swift.settings(trainer_of(host.GRPOTrainer, delta=2.0))).gate
    assert (gate.eps_low, gate.eps_high, gate.dual) == (0.1, 0.3, 2.0)
    swift.use(tokenrl.objective("ppo", eps_low=0.4))
    assert swift.CHOICE.row(swift.settings(trainer_of(host.GRPOTrainer))).gate.eps_low == 0.4


def test_another_value_than_ms_swift_s_raises(host, monkeypatch):
    swift.use()
    trainer = trainer_of(host.GRPOTrainer, loss_type="bnpo")
    monkeypatch.setattr(swift, "settings", lambda trainer: {"ppo": {"eps_low": 0.9, "eps_high": 0.9}})
    with pytest.raises(ValueError, match="^loss: got .* from tokenrl, .* from ms-swift, accepted: a relative"):
        evaluated(trainer, 1)


REFUSED = {
    "use_liger_kernel": ({"use_liger_kernel": True}, "^use_liger_kernel: got True, accepted: none"),
    "sdar": ({"sdar_loss_coef": 0.1}, "^sdar_loss_coef: got 0.1, accepted: none"),
    "chord": ({"chord_sft_dataset": ["a"]}, "^chord_sft_dataset: got .'a'., accepted: none"),
    "real": ({"loss_type": "real", "overlong_filter": True}, "^loss_type: got 'real' that leaves rows out, accepted"),
    "fipo": (
        {"loss_type": "fipo", "importance_sampling_level": "sequence"},
        "^importance_sampling_level: got 'sequence' of 'fipo', accepted: 'token'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_is_refused_where_the_trainer_is_made(name, host):
    options, message = REFUSED[name]
    swift.use()
    with pytest.raises(ValueError, match=message):
        trainer_of(host.GRPOTrainer, **options)


def test_rows_and_versions_are_refused_at_once(host, monkeypatch):
    with pytest.raises(ValueError, match="^objective: got 'ba', which needs group ids, accepted: a row of what swift"):
        swift.use("ba")
    with pytest.raises(ValueError, match="^parameter of 'ctpo': got 'eps_lo', .*Did you mean 'eps_low'"):
        swift.use("ctpo", eps_lo=1)
    swift.use("ctpo")
    with pytest.raises(ValueError, match="^loss_type: got 'real', accepted: another, which aggregates 'ctpo'"):
        trainer_of(host.GRPOTrainer, loss_type="real")
    host.GRPOTrainer = type("GRPOTrainer", (), {"_compute_loss_and_metrics": lambda self, batch: 0,
                                                "_prepare_algorithm_params": None})  # fmt: skip
    with pytest.raises(ValueError, match=r"^GRPOTrainer._compute_loss_and_metrics: got the parameters \(self, batch\)"):
        swift.use()
    monkeypatch.setattr(hosts, "version_of", lambda name: "4.5.0")
    with pytest.raises(ImportError, match="^ms-swift: got 4.5.0, accepted: ms-swift 4.6.0 to 4.6.0 for the loss"):
        swift.use()


def test_the_example_is_a_plugin(host):
    example = ROOT / "examples/swift_ctpo.py"
    exec(compile(example.read_text(), str(example), "exec"), {"__name__": "_swift_external_1"})
    trainer = trainer_of(host.GRPOTrainer)
    row = swift.CHOICE.row(swift.settings(trainer))
    assert row.name == "ctpo" and swift.counts(trainer, None, batch(0)[4])["aggregation"] == row.aggregation


def flat(metrics):
    found = {}
    for key, value in metrics.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        found |= {(key, k): float(v) for k, v in inner if not isinstance(v, (str, list))}
    return found
