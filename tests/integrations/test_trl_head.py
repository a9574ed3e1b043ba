"""patch_trl_head: the real DPO, KTO, SFT and RLOO trainers with their head by tokenrl, beside TRL's own; patch_trl."""

import tempfile

import pytest
import torch

trl = pytest.importorskip("trl", reason="trl is not installed (make test installs it)")

from datasets import Dataset  # noqa: E402
from trl.trainer import utils  # noqa: E402

from bench.trl_world import LETTERS, compared, model_folder, prompts, tokenizer, vowels  # noqa: E402
from tokenrl import compat  # noqa: E402
from tokenrl.integrations.trl import patch_trl, patch_trl_head, unpatch_trl, unpatch_trl_head  # noqa: E402
from tokenrl.integrations.trl.head import ChunkedLogProb  # noqa: E402


def words(seed, rows=32, length=6):
    picks = torch.randint(0, len(LETTERS), (rows, length), generator=torch.Generator().manual_seed(seed))
    return ["".join(LETTERS[i] for i in row) for row in picks.tolist()]


def pairs():
    return Dataset.from_dict({"prompt": words(1, length=3), "chosen": words(2), "rejected": words(3)})


def labelled():
    labels = [i % 3 != 0 for i in range(32)]
    return Dataset.from_dict({"prompt": words(1, length=3), "completion": words(2), "label": labels})


CASES = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, pairs, {}),
    "dpo, wpo weights": (trl.DPOTrainer, trl.DPOConfig, pairs, {"use_weighting": True}),
    "dpo, ipo": (trl.DPOTrainer, trl.DPOConfig, pairs, {"loss_type": "ipo"}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, labelled, {}),
    "sft": (trl.SFTTrainer, trl.SFTConfig, lambda: Dataset.from_dict({"text": words(1, length=9)}), {}),
    "rloo": (
        trl.RLOOTrainer, trl.RLOOConfig, prompts,
        {"num_generations": 4, "max_completion_length": 12, "beta": 0.1, "num_iterations": 2},
    ),
}  # fmt: skip


def run(name):
    trainer, config, data, options = CASES[name]
    args = config(
        output_dir=tempfile.mkdtemp(prefix="tokenrl-world-"), max_steps=4, per_device_train_batch_size=8, bf16=False,
        learning_rate=3e-3, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, seed=3, disable_tqdm=True,
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    own = {"reward_funcs": vowels} if name == "rloo" else {}
    made = trainer(model=model_folder(), args=args, train_dataset=data(), processing_class=tokenizer(), **own)
    made.train()
    return made


@pytest.fixture
def patched():
    yield
    unpatch_trl_head()
    unpatch_trl()


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_other_trainers(name, patched, monkeypatch):
    calls = []
    real = ChunkedLogProb.apply
    monkeypatch.setattr(ChunkedLogProb, "apply", staticmethod(lambda *args: calls.append(1) or real(*args)))
    theirs = run(name)
    assert not calls
    patch_trl_head()
    compared(theirs, run(name))
    assert calls


def test_patch_and_unpatch(patched):
    before = utils._ChunkedLogProbFunction, utils.selective_log_softmax
    for _ in range(2):
        patch_trl_head(), patch_trl()
    assert utils._ChunkedLogProbFunction is ChunkedLogProb
    assert utils.selective_log_softmax is compat.selective_log_softmax
    for _ in range(2):
        unpatch_trl_head(), unpatch_trl()
    assert (utils._ChunkedLogProbFunction, utils.selective_log_softmax) == before


def test_every_module_that_holds_a_function_gets_ours(patched):
    from trl.experimental.cpo import cpo_trainer

    theirs = cpo_trainer.selective_log_softmax
    patch_trl()
    assert cpo_trainer.selective_log_softmax is compat.selective_log_softmax
    unpatch_trl()
    assert cpo_trainer.selective_log_softmax is theirs
