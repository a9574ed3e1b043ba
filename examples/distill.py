"""A student of the demo's size learns from a teacher, on its own samples, straight from hidden states and both heads,
whose logits are never held: by the reverse KL of their distributions, by the teacher's eight likeliest tokens, or by
its log-probs of the sampled tokens alone.

pip install tokenrl[demo]
python examples/distill.py [whole | topk | sampled]
"""

import random
import sys
from collections.abc import Callable

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


def whole(own: Tensor, head: Tensor, wanted: Tensor, other: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, the divergences of the tokens) of hidden states and heads of student and teacher."""
    return tokenrl.linear_distillation_loss("reverse_kd", own, head, wanted, other, mask=mask)


def topk(own: Tensor, head: Tensor, wanted: Tensor, other: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    ids = tokenrl.linear_topk_ids(wanted, other, 8, row_mask=mask)
    teachers = tokenrl.linear_token_logprobs(wanted, other, ids, row_mask=mask, outputs=["logp"]).logp
    return tokenrl.linear_topk_distillation_loss("forward_kd", own, head, ids, teachers, mask=mask)


def sampled(
    own: Tensor, head: Tensor, wanted: Tensor, other: Tensor, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    teachers, logp = (
        tokenrl.linear_token_logprobs(*x, ids, row_mask=mask, outputs=["logp"]).logp
        for x in ((wanted, other), (own, head))
    )
    advantages = tokenrl.on_policy_distillation.teacher_advantages(logp.detach(), teachers, mask=mask)
    return tokenrl.policy_loss("ratio", logp, None, advantages, mask=mask)[0], -advantages


LOSSES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"whole": whole, "topk": topk, "sampled": sampled}


def distill(student: LlamaForCausalLM, teacher: LlamaForCausalLM, steps: int, by: str = "whole") -> list[float]:
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
        heads = (hidden_states(student, tokens), student.lm_head.weight, wanted, teacher.lm_head.weight.detach())
        loss, divergences = LOSSES[by](*heads, responses, mask)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        history.append((divergences.sum() / mask.sum()).item())
    return history


def main(by: str = "whole", steps: int = 150) -> tuple[list[float], float, float, float]:
    """(divergence of each batch, reward of the student before and after, of the teacher)."""
    teacher, student = (model.build(seed, torch.device("cpu")) for seed in (0, 1))
    train.warm_up(teacher, SETTINGS, lambda *progress: None)
    before = train.evaluate(student, SETTINGS)
    history = distill(student, teacher, steps, by)
    return history, before, train.evaluate(student, SETTINGS), train.evaluate(teacher, SETTINGS)


if __name__ == "__main__":
    history, before, after, teachers = main(*sys.argv[1:])
    tenth = len(history) // 10
    print(f"divergence {sum(history[:tenth]) / tenth:.3f} -> {sum(history[-tenth:]) / tenth:.3f}")
    print(f"reward {before:.3f} -> {after:.3f}, the teacher's {teachers:.3f}")
