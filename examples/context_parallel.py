"""Sequences whose tokens lie on the ranks of a context-parallel group: a loss of whole sequences, as on one process.

torchrun --nproc-per-node 2 examples/context_parallel.py
"""

import torch
import torch.distributed as dist

import tokenrl
from tokenrl.distributed import ContextShard

VOCAB, WIDTH, LENGTHS = 1000, 32, (40, 9, 23, 64)


def train(group: dist.ProcessGroup, device: str = "cpu", steps: int = 8) -> list[float]:
    """The losses of updates towards sequences with more even tokens; the same on all ranks."""
    torch.manual_seed(0)  # ranks hold the same batch, of ids and numbers, and the same model
    cu_seqlens = torch.tensor([0, *LENGTHS], device=device).cumsum(0)
    context = ContextShard(group, cu_seqlens, "zigzag_per_sequence")
    ids = torch.randint(VOCAB, (sum(LENGTHS),), device=device)
    before = context.take(ids.roll(1))  # shifted first, then cut: hidden states are of the own tokens alone
    model = torch.nn.ModuleList(torch.nn.Embedding(VOCAB, WIDTH, device=device, dtype=torch.float64) for _ in range(2))
    body, head = model[0], model[1].weight
    torch.nn.init.normal_(head, std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)

    even = torch.stack([part.double().mean() for part in (ids % 2 == 0).split(LENGTHS)])
    advantages = tokenrl.advantages.grpo(even, torch.zeros(len(LENGTHS), dtype=torch.int64, device=device))
    with torch.no_grad():
        own = tokenrl.linear_token_logprobs(body(before), head, context.take(ids), outputs=["logp"]).logp
        old_logp = context.gathered(own)
    history = []
    for _ in range(steps):
        loss, metrics = tokenrl.linear_policy_loss(
            "ctpo", body(before), head, ids, old_logp, advantages, cu_seqlens=cu_seqlens, context=context
        )
        optimizer.zero_grad()
        loss.backward()  # no collective: the own tokens' part of the gradient
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=group)  # parts of one loss are added up, not averaged
        optimizer.step()
        history.append(loss.item())
    if group.rank() == 0:
        print(f"{context.counts} tokens: loss {history[0]:.4f} -> {history[-1]:.4f}, approx_kl {metrics.approx_kl:.4f}")
    return history


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(dist.group.WORLD, f"cuda:{dist.get_rank()}" if on_gpu else "cpu")
    dist.destroy_process_group()
