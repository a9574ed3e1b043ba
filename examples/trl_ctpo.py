"""The demo's task in TRL's own GRPOTrainer, trained with CTPO: one import and one keyword are ours.

pip install tokenrl[trainers,demo]
python examples/trl_ctpo.py
"""

import random
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig

from tokenrl.demo import model, task, train
from tokenrl.integrations.trl import GRPOTrainer, TokenRLConfig


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per character of the task."""
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(task.CHARACTERS)}, unk_token=" "))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    end, blank = task.CHARACTERS[task.END], task.CHARACTERS[task.BLANK]
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, pad_token=blank, padding_side="left")


def problems(count: int) -> Dataset:
    found = task.problems(count, random.Random(1))
    return Dataset.from_dict({"prompt": [task.prompt(t) for t in found], "terms": found})


def right(completion_ids: list[list[int]], terms: list[list[int]], **_: object) -> list[float]:
    """1 where every total is right."""
    texts = ["".join(task.CHARACTERS[i] for i in ids) for ids in completion_ids]
    return [task.reward(tuple(t), text) for t, text in zip(terms, texts, strict=True)]


def main(steps: int = 40) -> list[float]:
    """The mean reward of each batch of rollouts."""
    settings = train.Settings()
    policy = model.build(settings.seed, torch.device("cpu"))
    train.warm_up(policy, settings, lambda step, reward: None)
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=128, num_generations=8, num_iterations=2,
        max_completion_length=task.RESPONSE_LENGTH, learning_rate=3e-4, max_steps=steps, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = GRPOTrainer(
        policy, right, args=args, train_dataset=problems(2048), processing_class=tokenizer(),
        tokenrl=TokenRLConfig(objective="ctpo"),
    )  # fmt: skip
    trainer.train()
    return [line["reward"] for line in trainer.state.log_history if "reward" in line]


if __name__ == "__main__":
    rewards = main()
    quarter = len(rewards) // 4
    first, last = (sum(part) / quarter for part in (rewards[:quarter], rewards[-quarter:]))
    print(f"mean reward of the first quarter {first:.3f}, of the last {last:.3f}")
