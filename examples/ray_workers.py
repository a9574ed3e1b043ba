"""A policy on workers of Ray, in the way verl runs them: the driver holds the batch, each actor is a rank of one
torch.distributed world. Ranks of a tensor-parallel group share the head's vocabulary, groups of them share the batch.

pip install tokenrl[ray]
python examples/ray_workers.py [TP DP]

Prints the loss of each step, and how far the workers' weights are from those of one process that trains on all of it.
"""

import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import tokenrl
from tokenrl.distributed import VocabShard, global_weights

VOCABULARY, WIDTH, SEQUENCES, LENGTH = 1000, 32, 12, 10
STEPS, RATE = 4, 20.0
AGGREGATION = "seq-mean-token-mean"


@dataclass
class Batch:
    """tokens [B, T + 1], old_logp, mask [B, T], advantages [B]: what a driver sends to a rank."""

    tokens: Tensor
    old_logp: Tensor
    mask: Tensor
    advantages: Tensor

    def part(self, index: int, parts: int) -> "Batch":
        return Batch(*(x.chunk(parts)[index] for x in vars(self).values()))


def drawn(step: int) -> Batch:
    """Sequences of unequal lengths, on which the ranks' counts differ."""
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=g)
    lengths = torch.randint(1, LENGTH + 1, (SEQUENCES, 1), generator=g)
    old = -torch.rand(SEQUENCES, LENGTH, generator=g, dtype=torch.float64) * 0.1 - 6.9
    return Batch(tokens, old, torch.arange(LENGTH) < lengths, torch.randn(SEQUENCES, generator=g, dtype=torch.float64))


class Policy:
    """An embedding and a head, of which a rank may hold some rows."""

    def __init__(self, rows: slice = slice(None)):
        g = torch.Generator().manual_seed(0)
        whole = (torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64) * 0.1 for _ in range(2))
        embedding, head = whole
        self.weights = [embedding.requires_grad_(), head[rows].clone().requires_grad_()]

    def gradients(self, batch: Batch, **how: Any) -> tuple[Tensor, list[Tensor]]:
        """(loss of the part, gradients); how: the weights of its tokens, and on which ranks the vocabulary lies."""
        embedding, head = self.weights
        hidden = torch.tanh(embedding[batch.tokens[:, :-1]])
        loss, _ = tokenrl.linear_policy_loss(
            "ctpo", hidden, head, batch.tokens[:, 1:], batch.old_logp, batch.advantages, mask=batch.mask,
            **how,
        )  # fmt: skip
        return loss.detach(), list(torch.autograd.grad(loss, self.weights))

    def update(self, gradients: list[Tensor]) -> None:
        with torch.no_grad():
            for weight, gradient in zip(self.weights, gradients, strict=True):
                weight -= RATE * gradient


class Worker:
    """A rank, which Ray makes an actor of."""

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be met."""
        with socket.socket() as free:
            free.bind(("", 0))
            return socket.gethostbyname(socket.gethostname()), free.getsockname()[1]

    def join(self, rank: int, tp: int, dp: int, address: tuple[str, int] | None = None) -> None:
        """Makes the groups that a trainer has, and what tokenrl is told of them."""
        if address is not None:
            os.environ |= {"MASTER_ADDR": address[0], "MASTER_PORT": str(address[1])}
            dist.init_process_group("gloo", rank=rank, world_size=tp * dp)
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        self.data = mesh["dp"].get_group()
        self.vocab = VocabShard.even(VOCABULARY, mesh["tp"])
        self.policy = Policy(slice(self.vocab.start, self.vocab.start + self.vocab.size))

    def step(self, batch: Batch) -> float:
        """Of this data-parallel rank's part of the batch; the loss of all of it."""
        (weight,) = global_weights(AGGREGATION, [batch.mask], group=self.data, dtype=torch.float64)
        how = {"token_weight": weight, "aggregation": "token-sum", "vocab": self.vocab}
        loss, gradients = self.policy.gradients(batch, **how)
        for x in (loss, *gradients):
            dist.all_reduce(x, group=self.data)
        self.policy.update(gradients)
        return loss.item()

    def weights(self) -> list[Tensor]:
        return [x.detach() for x in self.policy.weights]


def alone(steps: int) -> tuple[list[float], list[Tensor]]:
    """The losses and the weights of one process."""
    policy, losses = Policy(), []
    for step in range(steps):
        loss, gradients = policy.gradients(drawn(step), aggregation=AGGREGATION)
        policy.update(gradients)
        losses.append(loss.item())
    return losses, [x.detach() for x in policy.weights]


def farthest(found: list[list[Tensor]], tp: int, truth: list[Tensor]) -> float:
    """Of the ranks' weights: each has the whole embedding and its rows of the head."""
    heads = truth[1].chunk(tp)
    pairs = [(x, y) for rank, own in enumerate(found) for x, y in zip(own, (truth[0], heads[rank % tp]), strict=True)]
    return max((x - y).abs().max().item() for x, y in pairs)


def main(tp: int = 2, dp: int = 1) -> None:
    import ray

    ray.init(num_cpus=tp * dp, include_dashboard=False, log_to_driver=False)
    actor: Any = ray.remote(Worker)
    workers = [actor.remote() for _ in range(tp * dp)]
    address = ray.get(workers[0].address.remote())
    ray.get([worker.join.remote(rank, tp, dp, address) for rank, worker in enumerate(workers)])
    truth, weights = alone(STEPS)
    for step in range(STEPS):
        batch = drawn(step)
        losses = ray.get([worker.step.remote(batch.part(rank // tp, dp)) for rank, worker in enumerate(workers)])
        print(f"step {step}: loss {losses[0]:.6f}, of one process {truth[step]:.6f}")
    found = ray.get([worker.weights.remote() for worker in workers])
    print(f"largest difference of a weight from one process: {farthest(found, tp, weights):.1e}")
    ray.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
