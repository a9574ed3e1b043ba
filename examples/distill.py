"""A student of the demo's size learns from a teacher, on its own samples: reverse KL of their distributions, straight
from hidden states and both heads, whose logits are never held.

pip install tokenrl[demo]
python examples/distill.py
"""

import random

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import tokenrl
from tokenrl.demo import model, task, train

PROMPTS = 64
SETTINGS = train.Settings(warm_up_reward=0.8)


def hidden_states(policy: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """[B, T, D]: at t, what predicts response token t."""
    return policy.model(input_ids=tokens, use_cache=False).last_hidden_state[:, task.PROMPT_LENGTH - 1 : -1]


def distill(student: LlamaForCausalLM, teacher: LlamaForCausalLM, steps: int) -> list[float]:
    """On-policy distillation; the mean divergence of each batch."""
    source, generator = random.Random(1), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    history = []
    for _ in range(steps):
        terms = task.problems(PROMPTS, source)
        prompts = task.encode([task.prompt(t) for t in terms], task.PROMPT_LENGTH)
        responses, mask = model.sample(student, prompts, 1.0, generator)
        tokens = torch.cat([prompts, responses], 1)
        with torch.no_grad():
            wanted = hidden_states(teacher, tokens)
        loss, divergences = tokenrl.linear_distillation_loss(
            "reverse_kd", hidden_states(student, tokens), student.lm_head.weight, wanted,
            teacher.lm_head.weight.detach(), mask=mask,
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        history.append((divergences.sum() / mask.sum()).item())
    return history


def main(steps: int = 150) -> tuple[list[float], float, float, float]:
    """(divergence of each batch, reward of the student before and after, of the teacher)."""
    teacher, student = (model.build(seed, torch.device("cpu")) for seed in (0, 1))
    train.warm_up(teacher, SETTINGS, lambda *progress: None)
    before = train.evaluate(student, SETTINGS)
    history = distill(student, teacher, steps)
    return history, before, train.evaluate(student, SETTINGS), train.evaluate(teacher, SETTINGS)


if __name__ == "__main__":
    history, before, after, teachers = main()
    tenth = len(history) // 10
    print(f"divergence {sum(history[:tenth]) / tenth:.3f} -> {sum(history[-tenth:]) / tenth:.3f}")
    print(f"reward {before:.3f} -> {after:.3f}, the teacher's {teachers:.3f}")
