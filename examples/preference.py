"""The demo's policy learns from pairs of its own answers, a right one and a wrong one to the same problem, straight
from hidden states: by DPO, or by TDPO2, which also holds the wrong answers' distributions near the reference's.

pip install tokenrl[demo]
python examples/preference.py [dpo | tdpo2]
"""

import copy
import random
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import tokenrl
from tokenrl.demo import model, task, train

SETTINGS = train.Settings(warm_up_reward=0.3, prompts=96, rollouts=8)
ROUNDS = 12  # of new pairs
BATCH = 32  # pairs of an update


class Pairs(NamedTuple):
    """Prompts with answers, [2 P, ..]: the right ones, then the wrong ones."""

    tokens: Tensor
    ids: Tensor
    mask: Tensor


def hidden_states(policy: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """[B, T, D]: at t, what predicts response token t."""
    return policy.model(input_ids=tokens, use_cache=False).last_hidden_state[:, task.PROMPT_LENGTH - 1 : -1]


def pairs_of(policy: LlamaForCausalLM, source: random.Random, generator: torch.Generator) -> Pairs:
    """Of each problem whose answers are not all alike, one right and one wrong answer."""
    rollouts = train.collect(policy, task.problems(SETTINGS.prompts, source), SETTINGS, generator)
    rewards = rollouts.rewards.view(-1, SETTINGS.rollouts)
    mixed = (rewards.amax(1) > rewards.amin(1)).nonzero()[:, 0] * SETTINGS.rollouts
    first = rewards[mixed // SETTINGS.rollouts]
    rows = torch.cat([mixed + first.argmax(1), mixed + first.argmin(1)])
    return Pairs(rollouts.tokens[rows], rollouts.ids[rows], rollouts.mask[rows])


def loss_of(
    name: str, policy: LlamaForCausalLM, reference: LlamaForCausalLM, pairs: Pairs
) -> tuple[Tensor, tokenrl.LinearPreferenceMetrics]:
    with torch.no_grad():
        wanted = hidden_states(reference, pairs.tokens)
    return tokenrl.linear_preference_loss(
        name, hidden_states(policy, pairs.tokens), policy.lm_head.weight, pairs.ids, ref_hidden=wanted,
        ref_weight=reference.lm_head.weight.detach(), mask=pairs.mask,
    )  # fmt: skip


def prefer(
    policy: LlamaForCausalLM, reference: LlamaForCausalLM, pairs: Pairs, optimizer: torch.optim.Optimizer, name: str
) -> None:
    """Takes each pair once."""
    half = len(pairs.tokens) // 2
    for rows in torch.arange(half).split(BATCH):
        batch = Pairs(*(x[torch.cat([rows, rows + half])] for x in pairs))
        loss, _ = loss_of(name, policy, reference, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


def main(name: str = "dpo") -> tuple[list[float], list[float]]:
    """(margins of pairs that are not trained on, rewards on held-out problems), before and after."""
    reference = model.build(0, torch.device("cpu"))
    train.warm_up(reference, SETTINGS, lambda *progress: None)
    policy, source, generator = copy.deepcopy(reference), random.Random(1), torch.Generator().manual_seed(1)
    others = pairs_of(reference, source, generator)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-4, weight_decay=0.0)
    for _ in range(ROUNDS):
        prefer(policy, reference, pairs_of(policy, source, generator), optimizer, name)
    both = (reference, policy)
    with torch.no_grad():
        margins = [loss_of(name, each, reference, others)[1].margins.mean().item() for each in both]
    return margins, [train.evaluate(each, SETTINGS) for each in both]


if __name__ == "__main__":
    for what, (before, after) in zip(("margin", "reward"), main(*sys.argv[1:]), strict=True):
        print(f"{what} {before:.3f} -> {after:.3f}")
