"""TRL's real GRPOTrainer with and without tokenrl, from one seed: losses, gradient norms, every metric, the weights."""

import pytest

trl = pytest.importorskip("trl", reason="trl is not installed (make test installs it)")

import tokenrl  # noqa: E402
from bench.trl_world import Rollouts, compared, configured, trained  # noqa: E402
from tokenrl.integrations import hosts  # noqa: E402
from tokenrl.integrations.trl import GRPOTrainer, TokenRLConfig, TokenRLMixin  # noqa: E402
from tokenrl.integrations.trl import trainer as trainer_module  # noqa: E402

# Of a whole product each pair of settings at least once; the rest shows nothing new.
SETTINGS = {
    "grpo": {"loss_type": "grpo"},
    "grpo of sequences": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "grpo on-policy": {"loss_type": "grpo", "num_iterations": 1},
    "grpo, truncated masked": {"loss_type": "grpo", "mask_truncated_completions": True, "beta": 0.1},
    "grpo, high entropy, its bonus": {"loss_type": "grpo", "top_entropy_quantile": 0.6, "entropy_coef": 0.02},
    "grpo, adaptive entropy": {
        "loss_type": "grpo", "use_adaptive_entropy": True, "entropy_target": 3.36, "entropy_coef_delta": 0.01,
    },
    "grpo, off-policy sequences masked": {"loss_type": "grpo", "off_policy_mask_threshold": 0.02, "beta": 0.1},
    "grpo, token advantages": {"loss_type": "grpo", "extra": "token advantages"},
    "grpo, delta below the bound": {"loss_type": "grpo", "delta": 1.05, "importance_sampling_level": "sequence"},
    "bnpo, accumulated": {"loss_type": "bnpo", "gradient_accumulation_steps": 2, "entropy_coef": 0.02},
    "bnpo of sequences, tools": {"loss_type": "bnpo", "importance_sampling_level": "sequence", "extra": "tool mask"},
    "dr_grpo, beta, rollout ratio": {"loss_type": "dr_grpo", "beta": 0.1, "extra": "token ratio"},
    "dr_grpo, accumulated, delta": {"loss_type": "dr_grpo", "gradient_accumulation_steps": 2, "delta": 1.3},
    "dapo, beta of sequences, rollout ratio": {
        "loss_type": "dapo", "beta": 0.1, "importance_sampling_level": "sequence", "extra": "sequence ratio",
    },
    "dapo, beta uncorrected, accumulated": {
        "loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False, "gradient_accumulation_steps": 2,
    },
    "dapo, four iterations": {"loss_type": "dapo", "num_iterations": 4, "steps_per_generation": 4, "steps": 8},
    "dapo, high entropy, tools": {"loss_type": "dapo", "top_entropy_quantile": 0.6, "extra": "tool mask", "beta": 0.1},
    "cispo, beta": {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.1},
    "cispo of sequences, rollout ratio": {
        "loss_type": "cispo", "epsilon_high": 1.1, "importance_sampling_level": "sequence", "extra": "token ratio",
    },
    "sapo": {"loss_type": "sapo"},
    "sapo of sequences, beta": {"loss_type": "sapo", "importance_sampling_level": "sequence", "beta": 0.1},
    "luspo of sequences, accumulated": {
        "loss_type": "luspo", "importance_sampling_level": "sequence", "gradient_accumulation_steps": 2,
    },
    "vespo, beta": {"loss_type": "vespo", "beta": 0.1},
    "vespo, rollout ratio": {"loss_type": "vespo", "extra": "token ratio"},
    "llama, tied": {"loss_type": "dapo", "model": "llama, tied"},
    "gemma2, softcap": {"loss_type": "grpo", "model": "gemma2, softcap", "beta": 0.1},
    "cohere, logit_scale": {"loss_type": "bnpo", "model": "cohere, logit_scale"},
    "mixtral, balanced": {
        "loss_type": "grpo", "model": "mixtral, balanced", "gradient_accumulation_steps": 2,
        "model_init_kwargs": {"output_router_logits": True},
    },
    "temperature": {"loss_type": "dapo", "temperature": 0.7},
    "checkpointing, evaluation": {
        "loss_type": "grpo", "gradient_checkpointing": True, "eval_strategy": "steps", "eval_steps": 3,
    },
}  # fmt: skip


class Theirs(Rollouts, trl.GRPOTrainer):
    pass


class Ours(TokenRLMixin, Rollouts, trl.GRPOTrainer):
    pass


PREVENTS = {"top_entropy_quantile", "off_policy_mask_threshold"}


def depths_of(name):
    """With TRL's own head every fourth, as it is the same loss; all where this TRL has no other."""
    if not hasattr(trainer_module.utils, "add_fused_lm_head"):
        return ["loss"]
    own = ["loss"] if name in list(SETTINGS)[::4] else []
    return own + (["hidden"] if PREVENTS & {*SETTINGS[name]} or "mixtral" in name else ["hidden", "one-pass"])


@pytest.mark.parametrize("name", SETTINGS)
def test_the_numbers_are_those_of_trl(name):
    options = {"steps": 4} | SETTINGS[name]
    theirs = trained(Theirs, **options)
    for depth in depths_of(name):
        compared(theirs, trained(Ours, tokenrl=TokenRLConfig(head=depth, parity="always"), **options))


def test_the_numbers_are_those_of_trl_with_lora():
    """Whose head is frozen, and whose reference is the model without its adapter."""
    peft = pytest.importorskip("peft", reason="peft is not installed (make test installs it)")

    def run(trainer, **options):
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return trained(trainer, loss_type="dapo", beta=0.1, peft_config=lora, **options)

    compared(run(Theirs), run(Ours, tokenrl=TokenRLConfig(parity="always")))


def test_an_objective_of_the_table_trains():
    found = trained(GRPOTrainer, steps=3, tokenrl=TokenRLConfig(objective="ctpo"))
    logged = found.state.log_history[1]
    assert {"tokenrl/ess", "tokenrl/clip_low", "entropy", "loss", "grad_norm"} <= set(logged)
    assert not any(name.startswith("clip_ratio/") for name in logged)
    shares = [logged[name] for name in logged if name.startswith("tokenrl/clip_by_position/")]
    assert shares and all(0 <= share <= 1 for share in shares)
    theirs = trained(trl.GRPOTrainer, steps=3)
    assert theirs.state.log_history[1]["grad_norm"] != logged["grad_norm"]


def test_a_config_among_the_arguments():
    class Fixed(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            kwargs["args"].tokenrl = TokenRLConfig(parity="never")
            super().__init__(*args, **kwargs)

    assert trained(Fixed, steps=1)._tokenrl.parity == "never"


def test_another_loss_is_named(monkeypatch):
    real = trainer_module.loss_of

    def wrong(trainer, batch, row):
        loss, metrics = real(trainer, batch, row)
        return loss + 0.5 + 3 * batch.logp[1, 2], metrics

    monkeypatch.setattr(trainer_module, "loss_of", wrong)
    where = r"most at token 2 of completion 1, of gradient [23]\.[0-9]+ and -?[0-9.e-]+"
    with pytest.raises(ValueError, match=rf"^loss: got .* from tokenrl, .* from trl .*, {where}, accepted: a relative"):
        trained(Ours, steps=1, tokenrl=TokenRLConfig(head="hidden"))
    trained(Ours, steps=1, tokenrl=TokenRLConfig(parity="never"))


WRONG = {
    "head": ({"head": "hiden"}, "head: got 'hiden', accepted: auto, one-pass, hidden, loss. Did you mean 'hidden'"),
    "parity": ({"parity": "once"}, "parity: got 'once', accepted: first, always, never"),
    "objective": ({"objective": "cptoo"}, "objective: got 'cptoo'"),
    "groups": ({"objective": "ba"}, "objective: got 'ba', which needs group ids, accepted: a row of what TRL hands"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_of_the_config(name):
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        TokenRLConfig(**given)


def test_unsloth_is_refused():
    class UnslothGRPOTrainer(GRPOTrainer):
        pass

    with pytest.raises(ValueError, match="^trainer: got unsloth's generated GRPOTrainer"):
        trained(UnslothGRPOTrainer, steps=1)


def test_versions(monkeypatch):
    monkeypatch.setattr(hosts, "version_of", lambda name: "1.9.2")
    with pytest.raises(ImportError, match="^trl: got 1.9.2, accepted: trl 1.10.0 to 1.16.0 for the loss"):
        hosts.require("trl")
    monkeypatch.setattr(hosts, "version_of", lambda name: "1.17.0")
    with pytest.warns(UserWarning, match="^trl: got 1.17.0, held to trl 1.10.0 to 1.16.0"):
        hosts.require("trl")


@pytest.mark.parametrize("name", ["grpo, high entropy, its bonus", "mixtral, balanced"])
def test_what_prevents_one_pass_is_named(name):
    with pytest.raises(
        ValueError, match="^head: got 'one-pass' with [a-z_]+, accepted: 'hidden', which has its numbers"
    ):
        trained(Ours, tokenrl=TokenRLConfig(head="one-pass"), **SETTINGS[name])
    assert trained(Ours, **SETTINGS[name])._depth == "hidden"


def test_auto_is_the_deepest(monkeypatch):
    """And TRL's own head where DeepSpeed's ZeRO-3 would have taken the weight away before our backward."""
    assert configured(Ours)._depth == "one-pass"
    monkeypatch.setattr(trainer_module, "is_deepspeed_zero3_enabled", lambda: True)
    assert configured(Ours)._depth == "loss"
    for head in ("one-pass", "hidden"):
        with pytest.raises(ValueError, match=f"^head: got '{head}' with DeepSpeed's ZeRO-3, .*accepted: 'loss', or a"):
            configured(Ours, tokenrl=TokenRLConfig(head=head))


@pytest.mark.parametrize("head,leaf", [("one-pass", "hidden"), ("hidden", "logp")])
def test_a_training_step_is_recorded(head, leaf, tmp_path):
    """And its loss comes back."""
    with tokenrl.record(tmp_path / "batch") as recording:
        found = trained(Ours, steps=1, beta=0.1, tokenrl=TokenRLConfig(head=head, parity="never"))
    batch = tokenrl.load_batch(tmp_path / "batch")
    assert batch.leaf == leaf and recording.left_out == 0 and batch.objective.name == "ppo"
    logged = found.state.log_history[0]["loss"]
    assert batch.loss()[0].item() == pytest.approx(logged, rel=1e-4, abs=1e-6)
