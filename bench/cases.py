"""What is measured: the cases of each op, by default and as options choose them."""

import torch
from torch import Tensor

import tokenrl
from tokenrl.instruments.work import (
    divergence_of_logits,
    elementwise,
    gradient_of_divergence,
    gradient_of_logits,
    objective_of_tokens,
    statistics_of_logits,
)

from . import linear_cases
from .case import Case, Spec
from .eager import EAGER_DIVERGENCES, eager_ctpo, eager_logprobs

LOGIT_OPS = ("token_logprobs", "token_divergence", "policy_loss")
LINEAR_OPS = ("linear_token_logprobs", "linear_policy_loss")
OPS = LOGIT_OPS + LINEAR_OPS
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHECKED_ROWS = 64


def _logprobs(backend: str, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logp, entropy = tokenrl.token_logprobs(logits, ids, backend=backend)
    return logp, entropy


def _ctpo(backend: str, logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (tokenrl.policy_loss("ctpo", logp, old_logp, advantages, mask=mask, backend=backend)[0],)


def _random_logits(spec: Spec, g: torch.Generator) -> Tensor:
    """A few rows at a time: fp32 numbers of all of them would not fit."""
    logits = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=g.device)
    for part in logits.split(max(1, 2**26 // spec.shape[1])):
        part.copy_(torch.randn(part.shape, device=g.device, generator=g).mul_(3))
    return logits


def _checked_rows(spec: Spec, device: str) -> Tensor | None:
    rows, vocab = spec.shape
    half = min(CHECKED_ROWS, max(2, 2**27 // (8 * vocab))) // 2
    return None if rows <= 2 * half else torch.cat([torch.arange(half), torch.arange(rows - half, rows)]).to(device)


def logprob_case(spec: Spec, device: str) -> Case:
    """Log-prob and entropy of each row; the backward recomputes the exponentials."""
    rows, vocab = spec.shape
    g = torch.Generator(device=device).manual_seed(0)
    logits = _random_logits(spec, g)
    ids = torch.randint(0, vocab, (rows,), device=device, generator=g)
    cotangents = tuple(torch.randn(rows, device=device, generator=g) for _ in range(2))
    cells, size = logits.numel(), logits.element_size()
    return Case(
        spec, (logits.requires_grad_(), ids), cotangents, _logprobs, eager_logprobs,
        statistics_of_logits(cells, size), gradient_of_logits(cells, size), _checked_rows(spec, device),
    )  # fmt: skip


def divergence_case(spec: Spec, device: str) -> Case:
    """Of each row from a frozen teacher's: both heads are read, one gets a gradient."""
    g = torch.Generator(device=device).manual_seed(0)
    logits, other = _random_logits(spec, g), _random_logits(spec, g)
    cotangents = (torch.randn(spec.shape[0], device=device, generator=g),)
    cells, size = logits.numel(), logits.element_size()

    def run(backend: str, logits: Tensor, other_logits: Tensor) -> tuple[Tensor]:
        return (tokenrl.token_divergence(logits, other_logits, spec.variant, backend=backend),)

    return Case(
        spec, (logits.requires_grad_(), other), cotangents, run, EAGER_DIVERGENCES[spec.variant],
        divergence_of_logits(cells, 2 * size), gradient_of_divergence(cells, 2 * size, cells * size),
        _checked_rows(spec, device),
    )  # fmt: skip


def policy_case(spec: Spec, device: str) -> Case:
    """The ctpo loss; its forward reads log-probs, old log-probs and mask and writes one number per token."""
    rows, width = spec.shape
    g = torch.Generator(device=device).manual_seed(0)
    logp = (torch.randn(spec.shape, device=device, generator=g) - 2).requires_grad_()
    old_logp = logp.detach() + 0.01 * torch.randn(spec.shape, device=device, generator=g)
    advantages = torch.randn(rows, device=device, generator=g)
    lengths = torch.randint(width // 2, width + 1, (rows, 1), device=device, generator=g)
    mask = torch.arange(width, device=device) < lengths
    n = rows * width
    return Case(
        spec, (logp, old_logp, advantages, mask), (torch.tensor(1.0, device=device),),
        _ctpo, eager_ctpo, objective_of_tokens(n, 4, masked=True), elementwise(n, 4, 4),
    )  # fmt: skip


def default_sizes(device: str, small: bool) -> tuple[list, list, list, list]:
    """(shape, dtype) of the cases of token_logprobs, token_divergence, policy_loss and of both linear ops."""
    if small:
        logits = [((8, 1003), "bfloat16"), ((5, 1003), "float32"), ((100, 257), "bfloat16")]
        pairs = logits[:2]
        policies, heads = [(4, 300)], [((24, 16, 1003), "bfloat16"), ((24, 16, 1003), "float32")]
    elif device == "cuda":
        logits = [
            ((8192, 151936), "bfloat16"), ((4096, 151936), "float32"), ((2048, 262144), "bfloat16"),
            ((65536 + 8, 4096), "bfloat16"), ((8192, 32000), "bfloat16"),
        ]  # fmt: skip
        pairs = [((4096, 151936), "bfloat16"), ((2048, 151936), "float32"), ((8192, 32000), "bfloat16")]
        policies = [(64, 4096), (4096, 1024)]
        heads = [((8192, 4096, 151936), "bfloat16"), ((8192, 2048, 32000), "bfloat16")]
    else:
        logits = [
            ((2048, 151936), "bfloat16"), ((1024, 151936), "float32"), ((2048, 32000), "bfloat16"),
            ((2048, 32000), "float32"), ((1, 151936), "bfloat16"),
        ]  # fmt: skip
        pairs = [((1024, 151936), "bfloat16"), ((1024, 32000), "bfloat16"), ((1, 151936), "bfloat16")]
        policies = [(64, 4096), (256, 1024)]
        heads = [((2048, 1024, 151936), "bfloat16"), ((1024, 1024, 32000), "float32")]
    return logits, pairs, [(shape, "float32") for shape in policies], heads


def every_variant(specs: list[Spec]) -> list[Spec]:
    named = {"linear_policy_loss": linear_cases.VARIANTS, "token_divergence": tuple(EAGER_DIVERGENCES)}
    return [spec._replace(variant=variant) for spec in specs for variant in named.get(spec.op, ("",))]


def default_specs(device: str, small: bool) -> list[Spec]:
    """Those that run when none are named. small: for a check, not for a measurement."""
    *of_logits, heads = default_sizes(device, small)
    sizes = dict(zip(LOGIT_OPS, of_logits, strict=True)) | dict.fromkeys(LINEAR_OPS, heads)
    return every_variant([Spec(op, *size) for op in OPS for size in sizes[op]])


def named_specs(ops: list[str], shape: tuple[int, ...], dtypes: list[str]) -> list[Spec]:
    """A shape of two numbers with every op named that takes one, else token_logprobs; of three with the linear ops."""
    fitting, fallback = (LOGIT_OPS, LOGIT_OPS[:1]) if len(shape) == 2 else (LINEAR_OPS, LINEAR_OPS)
    default = {"policy_loss": ["float32"]}
    specs = [Spec(op, shape, d) for op in ops or fallback for d in dtypes or default.get(op, ["bfloat16"])]
    return every_variant([s for s in specs if s.op in fitting and (s.op != "policy_loss" or s.dtype == "float32")])


def chosen_specs(device: str, small: bool, ops: list[str], shapes: list[tuple[int, ...]], dtypes: list[str]):
    """The specs that options leave: named shapes with every op and dtype named beside them, else the defaults."""
    if shapes:
        specs = [spec for shape in shapes for spec in named_specs(ops, shape, dtypes)]
        return sorted(specs, key=lambda spec: OPS.index(spec.op))
    specs = default_specs(device, small)
    return [spec for spec in specs if (not ops or spec.op in ops) and (not dtypes or spec.dtype in dtypes)]


def make(spec: Spec, device: str) -> Case:
    if spec.op in LINEAR_OPS:
        return linear_cases.make(spec, DTYPES[spec.dtype], device)
    cases = {"token_logprobs": logprob_case, "token_divergence": divergence_case, "policy_loss": policy_case}
    return cases[spec.op](spec, device)
