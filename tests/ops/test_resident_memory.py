"""Memory that a call gives back is used again by the next."""

import subprocess
import sys

import pytest

CALLS = """
import resource, torch, tokenrl
torch.manual_seed(0)
torch.set_num_threads(1)
V, D, B, T = 5000, 32, 8, 32
logits, ids, hidden = torch.randn(B, T, V), torch.randint(0, V, (B, T)), torch.randn(B, T, D)
weight, old, advantages = torch.randn(V, D), torch.randn(B, T), torch.randn(B)
def call():
    x = logits.clone().requires_grad_()
    kept = tokenrl.token_logprobs(x, ids)
    y, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    tokenrl.linear_policy_loss("ppo", y, w, ids, old, advantages)[0].backward()
def gained(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(calls):
        call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10
gained(30)
print(gained(100))
"""


@pytest.mark.parametrize("process", range(2))  # how a heap is laid out differs from one to the next
def test_memory_beside_tensors_of_a_tiles_size(process):
    found = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 30, f"MiB of resident memory gained in 100 calls: {found.stdout}"
