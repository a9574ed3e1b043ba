"""What aggregations and advantages do to a batch, each by the package's own function: pictures of their pages."""

import torch
from torch import Tensor

import tokenrl

from .pictures import Curve, Picture, svg

LONGEST, ROLLOUTS = 64, 8  # of a sequence, in tokens; of a group
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm", "group-mean")


def pictured(what: str) -> str:
    """As it stands in a page."""
    return f'<div class="picture">\n{svg(what, COMPARED[what]())}\n</div>'.replace("\n\n", "\n")


def aggregations() -> Picture:
    """Of a batch with one sequence of each length, in groups of 16 that follow each other in length."""
    n = torch.arange(1, LONGEST + 1)
    mask, groups = torch.arange(LONGEST) < n[:, None], (n - 1) // 16
    curves = []
    for name in AGGREGATIONS:
        w = tokenrl.aggregation_weights(name, mask=mask, group_ids=groups if name == "group-mean" else None)
        curves.append(Curve(name, w[:, 0].double(), w.sum(1).double()))
    return Picture(n.double(), curves, ("tokens of the sequence", "w of a token", "w of its sequence"))


def advantages() -> Picture:
    """Of a group with rewards 0 and 1, by how many are 1."""
    right = torch.arange(1, ROLLOUTS)
    rewards = (torch.arange(ROLLOUTS) < right[:, None]).double().flatten()
    groups = torch.arange(len(right)).repeat_interleave(ROLLOUTS)
    found: dict[str, Tensor] = {
        "grpo": tokenrl.advantages.grpo(rewards, groups),
        "dr_grpo": tokenrl.advantages.grpo(rewards, groups, scale="none"),
        "rloo": tokenrl.advantages.rloo(rewards, groups),
        "maxrl": tokenrl.advantages.maxrl(rewards, groups),
    }
    curves = [Curve(name, *a.view(-1, ROLLOUTS)[:, [0, -1]].unbind(1)) for name, a in found.items()]
    return Picture(right / ROLLOUTS, curves, ("share of right rollouts", "A of a right one", "A of a wrong one"))


COMPARED = {"aggregations": aggregations, "advantages": advantages}
