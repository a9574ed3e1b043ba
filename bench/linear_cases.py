"""The cases of the ops that start from hidden states, and the bare GEMMs that are their limit."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import tokenrl
from tokenrl.logprobs.from_hidden import DEFAULT_BUDGET
from tokenrl.ops.linear.head import Head
from tokenrl.ops.linear.kept import logits_fit

from .case import Case, Gemms, Spec
from .eager import eager_linear_ctpo, eager_linear_logprobs

SEQUENCES = 8
CHECKED_TOKENS = 64
VARIANTS = ("all active", "half masked")
LOGIT_STD = 1.6


def _logprobs(backend: str, hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logp, entropy = tokenrl.linear_token_logprobs(hidden, weight, ids, backend=backend)
    return logp, entropy


def _ctpo(
    backend: str, hidden: Tensor, weight: Tensor, ids: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor]:
    loss, _ = tokenrl.linear_policy_loss(
        "ctpo", hidden, weight, ids, old_logp, advantages, mask=mask, backend=backend
    )  # fmt: skip
    return (loss,)


def _head(spec: Spec, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], ids [N]."""
    tokens, width, vocab = spec.shape
    hidden = torch.randn(tokens, width, device=g.device, generator=g).to(dtype)
    weight = torch.empty(vocab, width, dtype=dtype, device=g.device)
    for part in weight.split(max(1, 2**26 // width)):
        part.copy_(torch.randn(part.shape, device=g.device, generator=g).mul_(LOGIT_STD / width**0.5))
    ids = torch.randint(0, vocab, (tokens,), device=g.device, generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), ids


def logprob_case(spec: Spec, dtype: torch.dtype, device: str, settled: bool) -> Case:
    """Log-prob and entropy of each token; the backward computes the logits again where they were not kept."""
    g = torch.Generator(device=device).manual_seed(0)
    inputs = _head(spec, dtype, g)
    tokens, width, vocab = spec.shape
    cotangents = tuple(torch.randn(tokens, device=device, generator=g) for _ in range(2))
    head = Head(None, inputs[1], None, 1.0, None, 0.0, 1.0, None, dtype)
    kept = logits_fit(head, tokens, DEFAULT_BUDGET[inputs[0].device.type])
    return Case(
        spec, inputs, cotangents, _logprobs, eager_linear_logprobs, leaves=2,
        gemms=Gemms(2 * tokens * width * vocab, 3 if kept else 4),
    )  # fmt: skip


def policy_case(spec: Spec, dtype: torch.dtype, device: str, settled: bool) -> Case:
    """The ctpo loss of 8 sequences, of all their tokens or of the first half of each. settled: see log_ratios."""
    g = torch.Generator(device=device).manual_seed(0)
    tokens, width, vocab = spec.shape
    hidden, weight, ids = _head(spec, dtype, g)
    logp = current_logp(hidden, weight, ids).view(SEQUENCES, -1)
    old_logp = logp - log_ratios(logp.shape, g, settled)
    advantages = torch.randn(SEQUENCES, device=device, generator=g)
    share = 0.5 if spec.variant == "half masked" else 1.0
    length = logp.shape[1]
    active = -(-length // 2) if share < 1 else length
    mask = (torch.arange(length, device=device) < active).expand(SEQUENCES, -1).contiguous()
    hidden = hidden.detach().view(SEQUENCES, length, width).requires_grad_()
    return Case(
        spec, (hidden, weight, ids.view(SEQUENCES, length), old_logp, advantages, mask),
        (torch.tensor(1.0, device=device),), _ctpo, eager_linear_ctpo, leaves=2, forward_saves=False,
        gemms=Gemms(2 * tokens * width * vocab, 3, active / length),
    )  # fmt: skip


@torch.no_grad()
def current_logp(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """The policy's own log-probs [N], in plain torch: inputs do not depend on what is measured."""
    parts = zip(hidden.split(256), ids.split(256), strict=True)
    return torch.cat([eager_linear_logprobs(h, weight, i)[0] for h, i in parts])


def log_ratios(shape: tuple[int, int], g: torch.Generator, settled: bool) -> Tensor:
    """Log ratios of the tokens, logp - old_logp.

    settled: their sums lie between the bounds of the clip (-0.025 and 0.05 sqrt(t)) or well beyond one, so that no
    rounding of 16-bit logits changes a decision: where it did, an error would tell nothing about a backend.
    """
    if not settled:
        return 0.02 * torch.randn(shape, device=g.device, generator=g)
    levels = torch.tensor([-0.06, 0.0125, 0.0125, 0.1], device=g.device)
    chosen = levels[torch.randint(0, 4, shape, device=g.device, generator=g)]
    sums = chosen * torch.arange(1, shape[1] + 1, device=g.device).sqrt()
    return sums.diff(prepend=sums.new_zeros(shape[0], 1))


def make(spec: Spec, dtype: torch.dtype, device: str) -> Case:
    """The case, and beside it the one of few tokens that is checked: fp64 logits of all tokens would not fit."""
    build = logprob_case if spec.op == "linear_token_logprobs" else policy_case
    few = spec._replace(shape=(min(spec.shape[0], CHECKED_TOKENS), *spec.shape[1:]))
    return dataclasses.replace(build(spec, dtype, device, False), small=build(few, dtype, device, True))


def bare_gemms(case: Case) -> tuple[Callable[[], None], Callable[[], None]]:
    """(forward, forward and backward): the GEMMs of the ideal op on the case's inputs, into memory that is there."""
    hidden, weight = (x.detach().flatten(0, -2) for x in case.inputs[:2])
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def forward() -> None:
        torch.mm(hidden, weight.t(), out=logits)

    def both() -> None:
        for _ in range(case.gemms.both - 2):
            forward()
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.t(), hidden, out=grad_weight)

    return forward, both
