"""What a call costs beside its kernels: warm calls on tiny tensors, one thread, in additions of a 64 x 8 tensor.

The unit is timed in the same process, all in the processor time of the calling thread, so that the ratio means the same
on every machine, idle or not.
"""

from collections.abc import Callable
from time import thread_time

import torch

import tokenrl

ROUNDS, CALLS = 60, 20  # of each call the fastest round counts
# What the host side is held to, in additions; None: shown beside the line above it.
AIMS = {
    "policy_loss forward": 25,
    "policy_loss forward + backward": 40,
    "token_logprobs forward, with gradient": 20,
    "token_logprobs forward + backward": None,
    "linear_policy_loss forward, with gradient": 120,
    "linear_policy_loss forward + backward": None,
    "linear_token_logprobs forward, with gradient": 45,
    "linear_token_logprobs forward + backward": None,
    "advantages.grpo": 15,
}


def calls() -> dict[str, Callable[[], object]]:
    """The calls by their names in AIMS, on a backend that the machine chooses."""
    g = torch.Generator().manual_seed(0)

    def made(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(*shape, generator=g).requires_grad_(grad)

    logp, old, advantages = made(8, 8, grad=True), made(8, 8), made(8)
    constant, mask = logp.detach(), torch.ones(8, 8, dtype=torch.bool)
    logits, ids = made(8, 64, grad=True), torch.randint(0, 64, (8,), generator=g)
    hidden, weight = made(2, 4, 16, grad=True), made(64, 16, grad=True)
    rewards, groups = made(64), torch.arange(64) // 8
    rows = (ids.view(2, 4), made(2, 4), made(2))

    def policy(logp):
        return tokenrl.policy_loss("grpo", logp, old, advantages, mask=mask)[0]

    def logprobs():
        return tokenrl.token_logprobs(logits, ids).logp

    def linear_policy():
        return tokenrl.linear_policy_loss("grpo", hidden, weight, *rows)[0]

    def linear_logprobs():
        return tokenrl.linear_token_logprobs(hidden, weight, rows[0]).logp

    ones = {"token": torch.ones(8), "linear": torch.ones(2, 4)}
    found = (
        lambda: policy(constant),
        lambda: policy(logp).backward(),
        logprobs,
        lambda: logprobs().backward(ones["token"]),
        linear_policy,
        lambda: linear_policy().backward(),
        linear_logprobs,
        lambda: linear_logprobs().backward(ones["linear"]),
        lambda: tokenrl.advantages.grpo(rewards, groups),
    )
    return dict(zip(AIMS, found, strict=True))


def seconds(call: Callable[[], object]) -> float:
    begin = thread_time()
    for _ in range(CALLS):
        call()
    return (thread_time() - begin) / CALLS


def measure() -> dict[str, float]:
    """Call -> additions: the fastest of ROUNDS rounds of each, in turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.zeros(64, 8)
    timed = {"addition": lambda: x + 1} | calls()
    for call in timed.values():
        seconds(call)
    fastest = {name: min(seconds(call) for _ in range(ROUNDS)) for name, call in timed.items()}
    torch.set_num_threads(threads)
    unit = min(fastest.pop("addition"), *(seconds(timed["addition"]) for _ in range(ROUNDS)))
    return {name: value / unit for name, value in fastest.items()}
