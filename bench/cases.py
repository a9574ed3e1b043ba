"""What is measured: an op, its eager spelling, its inputs, and the bytes that an ideal kernel moves."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import tokenrl


@dataclass(frozen=True)
class Case:
    """run(backend) and eager() take no tensors and return (value, input): forward; the value's backward reaches the
    input.
    tokens: how many; forward_bytes, backward_bytes: the traffic of a kernel that reads and writes everything once."""

    op: str
    shape: str
    run: Callable[[str], tuple[Tensor, Tensor]]
    eager: Callable[[], tuple[Tensor, Tensor]]
    forward_bytes: int
    backward_bytes: int


def eager_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As trainers write it: an fp32 copy, log_softmax, gather, entropy."""
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def eager_ctpo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """CTPO as its authors' trainer writes it, in plain torch."""
    m = mask.float()
    d = (logp - old_logp).clamp(-20, 20) * m
    t = mask.cumsum(-1).clamp(min=1)
    s = (d.cumsum(-1).detach() + logp - logp.detach()).clamp(max=10)
    width = t.float() ** 0.5
    a = advantages[:, None]
    unclipped = -a * s.exp()
    clipped = -a * torch.minimum(torch.maximum(s, -0.025 * width), 0.05 * width).exp()
    loss = torch.maximum(unclipped, clipped)
    loss = torch.where(a < 0, torch.minimum(loss, -a * (0.05 * width).exp()), loss)
    return ((loss * m).sum(-1) / m.sum(-1).clamp(min=1)).mean()


def logprob_case(rows: int, vocab: int, dtype: torch.dtype, device: str) -> Case:
    g = torch.Generator(device=device).manual_seed(0)
    logits = (torch.randn(rows, vocab, device=device, generator=g) * 3).to(dtype).requires_grad_()
    ids = torch.randint(0, vocab, (rows,), device=device, generator=g)

    def run(backend):
        logp, entropy = tokenrl.token_logprobs(logits, ids, backend=backend)
        return (logp + 0.01 * entropy).sum(), logits

    def eager():
        logp, entropy = eager_logprobs(logits, ids)
        return (logp + 0.01 * entropy).sum(), logits

    size = rows * vocab * logits.element_size()
    return Case("token_logprobs", f"[{rows}, {vocab}] {str(dtype)[6:]}", run, eager, size, 2 * size)


def policy_case(rows: int, width: int, device: str) -> Case:
    g = torch.Generator(device=device).manual_seed(0)
    logp = (torch.randn(rows, width, device=device, generator=g) - 2).requires_grad_()
    old_logp = logp.detach() + 0.01 * torch.randn(rows, width, device=device, generator=g)
    advantages = torch.randn(rows, device=device, generator=g)
    lengths = torch.randint(width // 2, width + 1, (rows, 1), device=device, generator=g)
    mask = torch.arange(width, device=device) < lengths

    def run(backend):
        return tokenrl.policy_loss("ctpo", logp, old_logp, advantages, mask=mask, backend=backend)[0], logp

    n = rows * width
    return Case(
        "policy_loss ctpo", f"[{rows}, {width}] float32", run,
        lambda: (eager_ctpo(logp, old_logp, advantages, mask), logp), n * (4 + 4 + 1 + 4), n * (4 + 4),
    )  # fmt: skip


def cases(device: str, small: bool) -> list[Case]:
    """small: sizes for a check, not for a measurement."""
    if small:
        return [logprob_case(8, 1003, torch.bfloat16, device), policy_case(4, 300, device)]
    rows, sequences = (8192, 1024) if device == "cuda" else (256, 64)
    return [
        logprob_case(rows // 8, 151936, torch.float32, device),
        logprob_case(rows, 151936, torch.bfloat16, device),
        logprob_case(rows, 32000, torch.bfloat16, device),
        policy_case(64, 4096, device),
        policy_case(sequences * 4, 1024, device),
    ]
