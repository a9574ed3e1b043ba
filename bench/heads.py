"""The ops from hidden states: what is measured, and the bare GEMMs that are their limit."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import tokenrl

from .cases import DTYPES, eager_ctpo

OPS = ("linear_token_logprobs", "linear_policy_loss")
HALF_MASKED = "half masked"
SEQUENCES = 8
CHECKED_ROWS = 64


@dataclass(frozen=True)
class HeadCase:
    """call(logprobs, hidden, weight) gives the values; logprobs(hidden, weight, ids) -> (logp, entropy).

    hidden [N, D] and weight [V, D] get the gradients. ours(backend, hidden, weight) -> values. gemms: how many bare
    GEMMs of the shape forward and backward are held against. checked: a case of few rows, made alike, which is what is
    held to the tolerance rule: the fp64 truth of the whole one would not fit."""

    op: str
    variant: str
    shape: tuple[int, int, int]
    hidden: Tensor
    weight: Tensor
    ids: Tensor
    call: Callable[..., tuple[Tensor, ...]]
    ours: Callable[..., tuple[Tensor, ...]]
    cotangents: tuple[Tensor, ...]
    gemms: int
    mask: Tensor
    advantages: Tensor
    old_logp: Tensor
    checked: "HeadCase | None" = None

    @property
    def dtype(self) -> str:
        return str(self.hidden.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, self.variant, str(list(self.shape)), self.dtype)))

    def thunk(self, call: Callable, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
        """Values, with gradients of hidden and weight after them where the backward runs too."""

        def run() -> tuple[Tensor, ...]:
            leaves = self.hidden, self.weight
            values = call(*leaves)
            if not backward:
                return tuple(x.detach() for x in values)
            flow = [c.to(x.dtype).view(x.shape) for c, x in zip(self.cotangents, values, strict=True)]
            return *(x.detach() for x in values), *torch.autograd.grad(values, leaves, flow)

        return run

    def with_logprobs(self, logprobs: Callable) -> Callable:
        """The case by way of somebody's log-probs."""
        return functools.partial(self.call, logprobs)


def eager_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As trainers write it: all logits, an fp32 copy, log_softmax, gather, entropy."""
    logp = torch.log_softmax((hidden @ weight.t()).float(), -1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def make_head(spec: tuple[str, str, tuple[int, int, int], str], device: str) -> HeadCase:
    op, variant, shape, dtype = spec
    rows, width, vocab = shape
    g = torch.Generator(device=device).manual_seed(0)
    weight = (torch.randn(vocab, width, device=device, generator=g) * 0.05).to(DTYPES[dtype]).requires_grad_()
    small = CHECKED_ROWS if rows > CHECKED_ROWS else None
    checked = _of_rows(op, variant, (small, width, vocab), dtype, weight, g) if small else None
    return _of_rows(op, variant, shape, dtype, weight, g, checked)


def _of_rows(op, variant, shape, dtype, weight, g, checked=None) -> HeadCase:
    rows, width, vocab = shape
    device = weight.device
    hidden = torch.randn(rows, width, device=device, generator=g).to(DTYPES[dtype]).requires_grad_()
    ids = torch.randint(0, vocab, (rows,), device=device, generator=g)
    batch = (SEQUENCES, rows // SEQUENCES)
    half = variant == HALF_MASKED
    mask = (torch.arange(batch[1], device=device) < batch[1] // (2 if half else 1)).expand(batch).contiguous()
    advantages = torch.randn(SEQUENCES, device=device, generator=g)
    with torch.no_grad():
        logp = tokenrl.linear_token_logprobs(hidden, weight, ids, outputs=("logp",)).logp
    old_logp = (logp + 0.02 * torch.randn(rows, device=device, generator=g)).view(batch)

    def ctpo(logprobs, hidden, weight):
        return eager_ctpo(logprobs(hidden, weight, ids)[0].view(batch), old_logp, advantages, mask)

    def our_ctpo(backend, hidden, weight):
        states = hidden.view(*batch, width)
        given = (states, weight, ids.view(batch), old_logp.to(torch.promote_types(hidden.dtype, torch.float32)))
        return (tokenrl.linear_policy_loss("ctpo", *given, advantages, mask=mask, backend=backend)[0],)

    def ours(backend, hidden, weight):
        return tuple(tokenrl.linear_token_logprobs(hidden, weight, ids, backend=backend))

    if op == "linear_policy_loss":
        call, mine, cotangents, gemms = ctpo, our_ctpo, (torch.ones((), device=device),), 3
    else:
        call, mine, gemms = (lambda logprobs, hidden, weight: logprobs(hidden, weight, ids)), ours, 4
        cotangents = tuple(torch.randn(rows, device=device, generator=g) for _ in range(2))
    return HeadCase(
        op, variant, shape, hidden, weight, ids, call, mine, cotangents, gemms, mask, advantages, old_logp, checked
    )


class BareGemms:
    """The GEMMs of a case's shape into memory that is there already: forward, and forward with backward."""

    def __init__(self, case: HeadCase):
        self.hidden, self.weight, self.recomputes = case.hidden.detach(), case.weight.detach(), case.gemms == 4
        self.logits = self.hidden.new_empty(case.shape[0], case.shape[2])
        self.grad_hidden, self.grad_weight = torch.empty_like(self.hidden), torch.empty_like(self.weight)
        self.grad_logits = torch.randn_like(self.logits)

    def forward(self) -> None:
        torch.mm(self.hidden, self.weight.t(), out=self.logits)

    def both(self) -> None:
        for _ in range(1 + self.recomputes):
            self.forward()
        torch.mm(self.grad_logits, self.weight, out=self.grad_hidden)
        torch.mm(self.grad_logits.t(), self.hidden, out=self.grad_weight)


def head_specs(device: str, small: bool) -> list[tuple[str, str, tuple[int, int, int], str]]:
    """(op, variant, N x D x V, dtype) of the cases that run when none are named."""
    if small:
        shapes = [((24, 16, 1003), "bfloat16"), ((24, 16, 1003), "float32")]
    elif device == "cuda":
        shapes = [((8192, 4096, 151936), "bfloat16"), ((8192, 2048, 32000), "bfloat16")]
    else:
        shapes = [((2048, 1024, 151936), "bfloat16"), ((1024, 1024, 32000), "float32")]
    kinds = [(OPS[0], ""), (OPS[1], ""), (OPS[1], HALF_MASKED)]
    return [(*kind, *shape) for shape in shapes for kind in kinds]


def chosen_heads(device: str, small: bool, ops: list[str], shapes: list[tuple[int, ...]], dtypes: list[str]):
    """The specs that options leave: named shapes N x D x V in the dtypes named beside them, else the defaults."""
    specs = head_specs(device, small)
    if shapes:
        named = [(shape, dtype) for shape in shapes if len(shape) == 3 for dtype in dtypes or ["bfloat16"]]
        kinds = [(OPS[0], ""), (OPS[1], ""), (OPS[1], HALF_MASKED)]
        specs = [(*kind, *one) for one in named for kind in kinds]
    return [spec for spec in specs if (not ops or spec[0] in ops) and (not dtypes or spec[3] in dtypes)]
