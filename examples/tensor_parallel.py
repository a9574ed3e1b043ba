"""A head whose rows lie on the ranks of a tensor-parallel group: log-probs and a policy loss as on one process.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

import torch
import torch.distributed as dist

import tokenrl
from tokenrl.distributed import VocabShard

VOCAB, WIDTH, ROWS, LENGTH = 1000, 32, 16, 12


def train(group: dist.ProcessGroup, device: str = "cpu", steps: int = 8) -> list[float]:
    """The losses of updates towards sequences with more even tokens; the same on all ranks."""
    shard = VocabShard.even(VOCAB, group)
    torch.manual_seed(0)  # ranks hold the same batch and the same body
    ids = torch.randint(VOCAB, (ROWS, LENGTH), device=device)
    before = ids.roll(1, 1)  # of each token: its position's input, as a trainer shifts them
    body = torch.nn.Embedding(VOCAB, WIDTH, device=device, dtype=torch.float64)
    whole = 0.1 * torch.randn(VOCAB, WIDTH, device=device, dtype=torch.float64)
    head = torch.nn.Parameter(whole[shard.start : shard.start + shard.size].clone())
    optimizer = torch.optim.Adam([*body.parameters(), head], lr=0.001)

    groups = torch.arange(ROWS, device=device) // 4
    advantages = tokenrl.advantages.grpo((ids % 2 == 0).double().mean(1), groups)
    with torch.no_grad():
        old_logp = tokenrl.linear_token_logprobs(body(before), head, ids, vocab=shard, outputs=["logp"]).logp
    history = []
    for _ in range(steps):
        loss, metrics = tokenrl.linear_policy_loss("ctpo", body(before), head, ids, old_logp, advantages, vocab=shard)
        optimizer.zero_grad()
        loss.backward()  # no collective: hidden's gradient is whole, and the head's that of the own rows
        optimizer.step()
        history.append(loss.item())
    if group.rank() == 0:
        print(f"{shard}: loss {history[0]:.4f} -> {history[-1]:.4f}, approx_kl {metrics.approx_kl:.4f}")
    return history


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(dist.group.WORLD, f"cuda:{dist.get_rank()}" if on_gpu else "cpu")
    dist.destroy_process_group()
