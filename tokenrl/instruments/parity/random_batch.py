"""A batch made from a seed, for those who have recorded none."""

from typing import Any

import torch

from ...batch.checks import check_name
from ...logprobs.from_logits import token_logprobs
from ...objectives.policy import Objective, find_objective
from ..rollout_batch import RolloutBatch

SEQUENCES, WIDTH, VOCABULARY, HIDDEN = 8, 24, 31, 12
HEADS = ("logits", "hidden")


def random_batch(
    seed: int = 0, objective: str | Objective = "grpo", *, head: str = "logits", **settings: Any
) -> RolloutBatch:
    """A small padded batch with what losses go wrong on: ragged lengths, holes, a temperature, advantages of both
    signs, log ratios on both sides of usual clips, groups, a reference. fp32, on the CPU.

    Args:
        seed: the same one gives the same numbers.
        objective: the one it is for, a name or what tokenrl.objective returns.
        head: "logits" [8, 24, 31], or "hidden" [8, 24, 12] with a weight [31, 12].
        settings: others of a loss, as kl_coef=0.1.
    """
    check_name("head", head, HEADS)
    g = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, WIDTH)
    hidden, weight = torch.randn(*shape, HIDDEN, generator=g), torch.randn(VOCABULARY, HIDDEN, generator=g) / 2
    tensors = {"hidden": hidden, "weight": weight} if head == "hidden" else {"logits": hidden @ weight.t()}
    ids = torch.randint(0, VOCABULARY, shape, generator=g)
    lengths = torch.randint(WIDTH // 2, WIDTH + 1, (SEQUENCES, 1), generator=g)
    lengths[0] = WIDTH
    mask = (torch.arange(WIDTH) < lengths) & (torch.rand(shape, generator=g) > 0.15)
    mask[:, 0] = True
    given = {"temperature": 0.8} | settings
    logp = token_logprobs(hidden @ weight.t(), ids, temperature=given["temperature"], backend="reference").logp
    apart = torch.randn(shape, generator=g) * torch.where(torch.rand(shape, generator=g) < 0.5, 0.02, 0.3)
    advantages = torch.randn(SEQUENCES, generator=g).abs() + 0.3
    tensors |= {
        "ids": ids, "mask": mask, "old_logp": logp - apart, "ref_logp": logp + torch.randn(shape, generator=g) * 0.2,
        "advantages": torch.where(torch.arange(SEQUENCES) % 2 == 0, advantages, -advantages),
        "group_ids": torch.arange(SEQUENCES) // 4,
    }  # fmt: skip
    return RolloutBatch(tensors, find_objective(objective), given, {"made": f"from seed {seed}"})
