"""What `tokenrl plan` says of this machine's CPU, and what it takes: each way of each case, in one thread's processor
time and in bytes beyond the inputs, forward and backward."""

from collections.abc import Callable
from typing import Any

import torch

import tokenrl
from tokenrl.instruments import machine_limits
from tokenrl.instruments.plan.machines import measured
from tokenrl.instruments.plan.model import Shape
from tokenrl.instruments.plan.ways import ways

from .eager import eager_linear_ctpo
from .linear_cases import SEQUENCES
from .measure import peak_memory

TURNS = 5  # of each way; the fastest counts
# (shape, memory_budget of the linear ops)
CASES = (
    (Shape(1024, 256, 151936, torch.bfloat16), 256 << 20),
    (Shape(1024, 512, 50257, torch.bfloat16), 24 << 20),
    (Shape(4096, 128, 32000, torch.bfloat16), 24 << 20),
    (Shape(1024, 256, 32000, torch.float32), 24 << 20),
    (Shape(512, 1024, 50257, torch.float32), 256 << 20),
    (Shape(64, 1024, 50257, torch.bfloat16), 256 << 20),
    (Shape(256, 64, 4096, torch.float32), 256 << 20),
)


def calls(shape: Shape, budget: int) -> dict[str, Callable[[], object]]:
    """Way -> gradients of hidden and weight. Every token has one: no log ratio is near a bound of the clip."""
    g, rows = torch.Generator().manual_seed(0), (SEQUENCES, shape.tokens // SEQUENCES)
    hidden = torch.randn(*rows, shape.hidden, generator=g).to(shape.dtype).requires_grad_()
    weight = torch.randn(shape.vocab, shape.hidden, generator=g).mul_(shape.hidden**-0.5).to(shape.dtype)
    weight.requires_grad_()
    ids, mask = torch.randint(0, shape.vocab, rows, generator=g), torch.ones(rows, dtype=torch.bool)
    with torch.no_grad():
        logp = tokenrl.linear_token_logprobs(hidden, weight, ids, memory_budget=budget).logp
    old, advantages = logp + 1e-5 * torch.randn(rows, generator=g), torch.randn(SEQUENCES, generator=g)
    rest = (old, advantages)

    def from_logits() -> torch.Tensor:
        logits = torch.nn.functional.linear(hidden, weight)
        return tokenrl.policy_loss("ctpo", tokenrl.token_logprobs(logits, ids).logp, *rest, mask=mask)[0]

    def from_hidden() -> torch.Tensor:
        found = tokenrl.linear_token_logprobs(hidden, weight, ids, memory_budget=budget).logp
        return tokenrl.policy_loss("ctpo", found, *rest, mask=mask)[0]

    def linear(row: str, *given: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        head = (given[0], weight, *given[1:])
        return tokenrl.linear_policy_loss(row, *head, memory_budget=budget, **more)[0]

    # One sequence of all tokens, whose statistic is a mean over them.
    flat = (hidden.view(-1, shape.hidden), ids.view(-1), old.view(-1), advantages[:1])
    losses: dict[str, Callable[[], torch.Tensor]] = {
        "eager": lambda: eager_linear_ctpo(hidden, weight, ids, old, advantages, mask)[0],
        "token_logprobs": from_logits,
        "linear_token_logprobs": from_hidden,
        "linear_policy_loss": lambda: linear("ctpo", hidden, ids, *rest, mask=mask),
        "linear_policy_loss, 2 passes": lambda: linear("gspo", *flat, cu_seqlens=torch.tensor([0, shape.tokens])),
    }
    return {name: lambda loss=loss: torch.autograd.grad(loss(), (hidden, weight)) for name, loss in losses.items()}


def measure() -> list[dict[str, Any]]:
    """A row of the table each: the case, the way, seconds and bytes as the plan has them and as they are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = [row for shape, budget in CASES for row in _rows(shape, budget)]
    torch.set_num_threads(threads)
    return found


def _rows(shape: Shape, budget: int) -> list[dict[str, Any]]:
    machine, made = measured("cpu", shape), calls(shape, budget)
    planned = {way.name: way for way in ways(shape, "cpu", budget)}
    peaks = {name: peak_memory(made[name], "cpu") for name in planned}  # and each has run once
    taken: dict[str, list[float]] = {name: [] for name in planned}
    for _ in range(TURNS):
        for name, times in taken.items():
            times.append(machine_limits.seconds(made[name], "cpu", machine_limits.clock("cpu")))
    case = {"shape": [shape.tokens, shape.hidden, shape.vocab], "dtype": str(shape.dtype)[6:], "budget": budget}
    return [
        case | {
            "way": name, "planned_seconds": machine.times(way)[1], "seconds": min(taken[name]),
            "planned_bytes": way.peaks[1], "bytes": peaks[name],
        }
        for name, way in planned.items()
    ]  # fmt: skip
