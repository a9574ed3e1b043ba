"""What a call on the CPU costs beside a plain one, and what it does where memory ends.

Costs are ratios of one thread's CPU time in this process.
"""

import subprocess
import sys
import time

import pytest
import torch

import tokenrl

INF = float("inf")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cost(call, repeats: int = 7) -> float:
    call()
    found = INF
    for _ in range(repeats):
        begun = time.thread_time()
        call()
        found = min(found, time.thread_time() - begun)
    return found


def logprobs(logits, backward=False, **options):
    ids = torch.zeros(logits.shape[0], dtype=torch.long)

    def call():
        x = logits.detach().requires_grad_(backward)
        logp = tokenrl.token_logprobs(x, ids, backend="cpu", **options).logp
        if backward:
            torch.autograd.grad(logp.sum(), x)

    return call


def some_logits():
    return torch.randn(64, 32000, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.995])
def test_logits_of_minus_infinity(share, backward):
    plain = some_logits()
    taken_out = torch.where(torch.rand_like(plain) < share, -INF, plain)
    taken_out[:, 0] = 1
    assert cost(logprobs(taken_out, backward)) < 2 * cost(logprobs(plain, backward))


@pytest.mark.parametrize(
    "options, limit",
    [
        ({"keep_mask": torch.arange(32000) % 10 != 3}, 2.5),
        ({"temperature": 0.05}, 2),
        ({"softcap": 30.0}, 6),
    ],
    ids=["keep_mask", "temperature", "softcap"],
)
@pytest.mark.parametrize("backward", [False, True])
def test_options(options, limit, backward):
    x = some_logits()
    assert cost(logprobs(x, backward, **options)) < limit * cost(logprobs(x, backward))


@pytest.mark.parametrize("name", ["ppo", "dapo", "rmt", "dhpo", "dhpo_branch"])
def test_bounds_cost_no_branches(name):
    """Whatever the data: hapo contains the same formula."""
    logp = -torch.rand(64, 1024) * 2
    old, advantages = logp + torch.randn(64, 1024), torch.randn(64)
    taken = {o: cost(lambda o=o: tokenrl.policy_loss(o, logp, old, advantages, backend="cpu")) for o in (name, "hapo")}
    assert taken[name] < 2 * taken["hapo"]


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
    assert done.stdout.split() == ["raised", "-1.0"], done.stderr[-500:]


def test_real_is_linear_in_the_rows():
    def per_row(rows):
        logp = torch.randn(rows, 4, requires_grad=True)
        old, advantages, groups = torch.randn(rows, 4), torch.randn(rows), torch.arange(rows) // 8

        def call():
            loss, _ = tokenrl.policy_loss("real", logp, old, advantages, group_ids=groups)
            torch.autograd.grad(loss, logp)

        return cost(call, 3) / rows

    assert per_row(8192) < 3 * per_row(1024)
