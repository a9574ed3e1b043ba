"""Where memory ends a kernel raises, and the process goes on."""

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_out_of_memory_raises():
    code = """
import resource, torch, tokenrl
torch.set_num_threads(1)
n = 3_000_000
logp, old, advantages = torch.zeros(1, n), torch.zeros(1, n), torch.ones(1)
tokenrl.policy_loss("gspo", logp[:, :100].contiguous(), old[:, :100].contiguous(), advantages, backend="cpu")
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (100 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    tokenrl.policy_loss("gspo", logp, old, advantages, backend="cpu")
except (MemoryError, RuntimeError):
    print("raised")
loss, _ = tokenrl.policy_loss("gspo", logp[:, :100].contiguous(), old[:, :100].contiguous(), advantages, backend="cpu")
print(loss.item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    raised, loss = done.stdout.split()
    assert raised == "raised" and float(loss) == pytest.approx(-1, rel=1e-6), done.stderr[-500:]
