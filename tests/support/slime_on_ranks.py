"""A custom loss of slime or miles on context-parallel ranks, which hold parts of responses."""

from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from rank_numbers import generator, held, normal


class MegatronHost(ModuleType):
    """What slime's loss module is to a custom loss: the means of responses of which a rank has two of four parts each,
    the prompt's last token predicting a response's first. group: None without such ranks."""

    totals, lengths = [11, 7, 5, 9], [8, 4, 1, 6]

    def __init__(self, group):
        super().__init__("slime.loss")
        self.group, world = group, 1 if group is None else group.size()
        if group is not None:
            self.mpu = SimpleNamespace(get_context_parallel_group=lambda: group)
        self.parts = []
        for total, length in zip(self.totals, self.lengths, strict=True):
            size, prompt = -(-total // (2 * world)), total - length
            of_rank = range(2 * world) if group is None else (group.rank(), 2 * world - 1 - group.rank())
            places = [place for part in of_rank for place in range(part * size, (part + 1) * size)]
            self.parts.append([place + 1 - prompt for place in places if prompt - 1 <= place < total - 1])

    def own(self, x):
        """Of numbers of all responses, this rank's, response by response."""
        return [whole[part] for whole, part in zip(x.split(self.lengths), self.parts, strict=True)]

    @property
    def batch(self):
        mask = torch.rand(sum(self.lengths), generator=generator(9)) < 0.8
        columns = {"log_probs": 0.2 * normal(sum(self.lengths), seed=10) - 2, "advantages": normal(19, seed=11)}
        return {name: self.own(x) for name, x in columns.items()} | {
            "loss_masks": list(mask.double().split(self.lengths)), "response_lengths": self.lengths,
            "total_lengths": self.totals,
        }  # fmt: skip

    def mean(self, x):
        masks = self.batch["loss_masks"]
        own = x.split([len(part) for part in self.parts])
        pieces = zip(own, self.own(torch.cat(masks)), masks, strict=True)
        return sum((values * part).sum() / mask.sum().clamp(min=1) for values, part, mask in pieces)

    def get_log_probs_and_entropy(self, logits):
        return {"log_probs": list(logits.split([len(part) for part in self.parts]))}

    def compute_policy_loss(self, ppo_kl, advantages):
        raise AssertionError("a custom loss stands in for it")

    def policy_loss_function(self, args, batch, logits, mean):
        logp = torch.cat(self.get_log_probs_and_entropy(logits)["log_probs"])
        per_token, clipped = self.compute_policy_loss(torch.cat(batch["log_probs"]) - logp.detach(), None)
        return mean(per_token) + 0.1 * mean(logp), {"pg_clipfrac": mean(clipped)}


def slime_context(group):
    """A custom loss of slime or miles under context parallelism, of rows of prefixes, of whole responses, with a form,
    and of single tokens: the ranks' losses and clip fractions add up to those of one process."""
    from tokenrl.integrations import custom_loss
    from tokenrl.objectives.policy import OBJECTIVES

    args = SimpleNamespace(use_rollout_logprobs=False, qkv_format="thd")
    logits = 0.2 * normal(19, seed=12) - 2

    def run(host, name):
        logp = torch.cat(host.own(logits)).requires_grad_()
        loss, reported = custom_loss.evaluate(OBJECTIVES[name], host, args, host.batch, logp, host.mean)
        (grad,) = torch.autograd.grad(loss, logp)
        return torch.stack([loss.detach(), reported["pg_clipfrac"]]), grad

    whole, ours = MegatronHost(None), MegatronHost(group)
    for name in ("ctpo", "gspo", "gmpo", "ppo"):
        sums, grad = run(whole, name)
        found, own = run(ours, name)
        dist.all_reduce(found, group=group)
        held((sums, torch.cat(ours.own(grad))), (found, own))
    if group.rank() == 0:  # of which the other has to hear
        ours.parts[0] = ours.parts[0][1:]
    try:
        run(ours, "ctpo")
    except ValueError as error:
        assert "gathered: rank 0: ValueError: x: got shape" in str(error), error
    else:
        raise AssertionError("a rank with other tokens was not noticed")
