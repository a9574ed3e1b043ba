"""A world small enough for TRL's real trainers on a CPU: models, a tokenizer and prompts made here, none fetched."""

import functools
import math
import tempfile
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["<pad>", "<eos>", "<unk>"]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


SIZES = {
    "vocab_size": len(SPECIAL) + len(LETTERS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
MODELS = {
    "qwen2": (transformers.Qwen2Config, {}),
    "llama, tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "gemma2, softcap": (transformers.Gemma2Config, {"final_logit_softcapping": 2.0, "head_dim": 8}),
    "cohere, logit_scale": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "mixtral, balanced": (
        transformers.MixtralConfig,
        {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1},
    ),
}  # fmt: skip


def made_model(kind: str = "qwen2", **changes: Any) -> Any:
    """Two layers of random weights, the same at every call."""
    torch.manual_seed(0)
    config, own = MODELS[kind]
    return transformers.AutoModelForCausalLM.from_config(config(**(SIZES | own | changes)))


@functools.cache
def model_folder(kind: str = "qwen2") -> str:
    """Of a model, saved with the tokenizer, as TRL loads a reference model by name."""
    folder = tempfile.mkdtemp(prefix="tokenrl-world-")
    made_model(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prompts(rows: int = 32) -> Dataset:
    g = torch.Generator().manual_seed(1)
    picks = torch.randint(0, len(LETTERS), (rows, 4), generator=g)
    return Dataset.from_dict({"prompt": ["".join(LETTERS[i] for i in row) for row in picks.tolist()]})


def vowels(completions: list[str], **_: Any) -> list[float]:
    """The reward: the share of vowels, less a little for length."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) - 0.01 * len(text) for text in completions]


OURS = ("tokenrl/", "eval_tokenrl/")
TIMES = ("step_time", "eval_runtime", "eval_samples", "eval_steps", "train_runtime", "train_samples", "train_steps")
NOT_COMPARED = OURS + TIMES


class Rollouts:
    """What needs vLLM, tools or a user's own advantages, made of seeded noise. Before a GRPOTrainer among the bases."""

    extra = ""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self.use_vllm = False
        out = super()._generate_and_score_completions(inputs)
        mask, g = out["completion_mask"], torch.Generator().manual_seed(int(out["completion_ids"].sum()))
        if self.extra in ("token ratio", "sequence ratio"):
            self.use_vllm = True
            shape = mask.shape if self.extra == "token ratio" else (mask.shape[0], 1)
            noise = 0.3 * torch.randn(shape, generator=g)
            out["importance_sampling_ratio"] = (noise * mask if noise.shape == mask.shape else noise).exp()
        if self.extra == "tool mask":
            out["tool_mask"] = (torch.rand(mask.shape, generator=g) > 0.3).long()
        if self.extra == "token advantages":
            out["advantages"] = out["advantages"][:, None] + 0.1 * torch.randn(mask.shape, generator=g)
        return out


def configured(trainer: Any, model: Any = "qwen2", steps: int = 6, **options: Any) -> Any:
    """A GRPOTrainer on the world; options: of GRPOConfig, or its own keywords tokenrl and peft_config."""
    own = {name: options.pop(name) for name in ("tokenrl", "peft_config") if name in options}
    defaults = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 12, "learning_rate": 3e-3,
        "num_iterations": 2, "epsilon": 0.1, "epsilon_high": 0.15, "logging_steps": 1, "report_to": [], "bf16": False,
        "save_strategy": "no", "use_cpu": True, "seed": 3, "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    args = GRPOConfig(output_dir=tempfile.mkdtemp(prefix="tokenrl-world-"), max_steps=steps, **(defaults | options))
    folder = model_folder(model) if model in MODELS else model
    transformers.set_seed(args.seed)  # some versions of TRL draw an adapter's weights before they do this
    return trainer(
        model=folder, reward_funcs=vowels, args=args,
        train_dataset=prompts(), eval_dataset=prompts(8) if "eval_strategy" in options else None,
        processing_class=tokenizer(), **own,
    )  # fmt: skip


def trained(trainer: Any, extra: str = "", **options: Any) -> Any:
    """The same after its steps, from one seed."""
    made = configured(trainer, **options)
    made.extra = extra
    made.train()
    return made


def compared(theirs: Any, ours: Any) -> None:
    """Everything two trainers logged, but times, and their weights."""
    assert len(theirs.state.log_history) == len(ours.state.log_history) > 0
    for expected, found in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        assert {name for name in found if not name.startswith(NOT_COMPARED)} == {
            name for name in expected if not name.startswith(NOT_COMPARED)
        }
        for name in expected:
            if name.startswith(NOT_COMPARED):
                continue
            a, b, rel = expected[name], found[name], 1e-4 if name == "grad_norm" else 1e-5
            if a is None or b is None or math.isnan(a):  # TRL logs None for a metric without a value
                assert repr(a) == repr(b), (name, a, b)
            else:
                assert math.isclose(a, b, rel_tol=rel, abs_tol=1e-6), (name, a, b)
    for p, q in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
