"""What is measured: an op on inputs, its eager spelling, and the work of an ideal kernel."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import tokenrl

OPS = ("token_logprobs", "policy_loss")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Work:
    """What an ideal kernel does: bytes that it reads and writes, each once, and exponentials."""

    read: int
    written: int
    exponentials: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Case:
    """run(backend, *inputs) and eager(*inputs) return a tuple of tensors; inputs[0] gets the gradient.

    cotangents: what flows into each result. rows: the rows that are checked against the truth, None for all of them;
    only an op whose rows do not meet may name some.
    """

    op: str
    shape: tuple[int, int]
    inputs: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    run: Callable[..., tuple[Tensor, ...]]
    eager: Callable[..., tuple[Tensor, ...]]
    forward: Work
    backward: Work
    rows: Tensor | None = None

    @property
    def dtype(self) -> str:
        return str(self.inputs[0].dtype).removeprefix("torch.")

    @property
    def tokens(self) -> int:
        """Elements of the per-token results."""
        return self.shape[0] if self.op == "token_logprobs" else self.shape[0] * self.shape[1]

    @property
    def name(self) -> str:
        return f"{self.op} {list(self.shape)} {self.dtype}"

    def checked(self, x: Tensor) -> Tensor:
        """The rows of a tensor (one per row of the first input) that are held to the tolerance rule."""
        return x if self.rows is None or x.dim() == 0 else x[self.rows]


def eager_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As trainers write it: an fp32 copy, log_softmax, gather, entropy."""
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def eager_ctpo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor]:
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
    return (((loss * m).sum(-1) / m.sum(-1).clamp(min=1)).mean(),)


def _logprobs(backend: str, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logp, entropy = tokenrl.token_logprobs(logits, ids, backend=backend)
    return logp, entropy


def _ctpo(backend: str, logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (tokenrl.policy_loss("ctpo", logp, old_logp, advantages, mask=mask, backend=backend)[0],)


def logprob_case(shape: tuple[int, int], dtype: str, device: str) -> Case:
    """Log-prob and entropy of each row; the backward recomputes the exponentials."""
    rows, vocab = shape
    g = torch.Generator(device=device).manual_seed(0)
    logits = torch.empty(shape, dtype=DTYPES[dtype], device=device)
    for part in logits.split(max(1, 2**26 // vocab)):
        part.copy_(torch.randn(part.shape, device=device, generator=g).mul_(3))
    ids = torch.randint(0, vocab, (rows,), device=device, generator=g)
    cotangents = tuple(torch.randn(rows, device=device, generator=g) for _ in range(2))
    half = min(CHECKED_ROWS, max(2, 2**27 // (8 * vocab))) // 2
    ends = None if rows <= 2 * half else torch.cat([torch.arange(half), torch.arange(rows - half, rows)]).to(device)
    size = logits.numel() * logits.element_size()
    return Case(
        "token_logprobs", shape, (logits.requires_grad_(), ids), cotangents, _logprobs, eager_logprobs,
        Work(size, 0, logits.numel()), Work(size, size, logits.numel()), ends,
    )  # fmt: skip


def policy_case(shape: tuple[int, int], dtype: str, device: str) -> Case:
    """The ctpo loss; its forward reads log-probs, old log-probs and mask and writes one number per token."""
    rows, width = shape
    g = torch.Generator(device=device).manual_seed(0)
    logp = (torch.randn(shape, device=device, generator=g) - 2).requires_grad_()
    old_logp = logp.detach() + 0.01 * torch.randn(shape, device=device, generator=g)
    advantages = torch.randn(rows, device=device, generator=g)
    lengths = torch.randint(width // 2, width + 1, (rows, 1), device=device, generator=g)
    mask = torch.arange(width, device=device) < lengths
    n = rows * width
    return Case(
        "policy_loss", shape, (logp, old_logp, advantages, mask), (torch.tensor(1.0, device=device),),
        _ctpo, eager_ctpo, Work(9 * n, 4 * n, n), Work(4 * n, 4 * n, 0),
    )  # fmt: skip


def default_specs(device: str, small: bool) -> list[tuple[str, tuple[int, int], str]]:
    """(op, shape, dtype) of the cases that run when none are named. small: for a check, not for a measurement."""
    if small:
        logits = [((8, 1003), "bfloat16"), ((5, 1003), "float32"), ((100, 257), "bfloat16")]
        policies = [(4, 300)]
    elif device == "cuda":
        logits = [
            ((8192, 151936), "bfloat16"), ((4096, 151936), "float32"), ((2048, 262144), "bfloat16"),
            ((65536 + 8, 4096), "bfloat16"), ((8192, 32000), "bfloat16"),
        ]  # fmt: skip
        policies = [(64, 4096), (4096, 1024)]
    else:
        logits = [
            ((2048, 151936), "bfloat16"), ((1024, 151936), "float32"), ((2048, 32000), "bfloat16"),
            ((2048, 32000), "float32"), ((1, 151936), "bfloat16"),
        ]  # fmt: skip
        policies = [(64, 4096), (256, 1024)]
    return [("token_logprobs", *one) for one in logits] + [("policy_loss", shape, "float32") for shape in policies]


def chosen_specs(device: str, small: bool, ops: list[str], shapes: list[tuple[int, int]], dtypes: list[str]):
    """The specs that options leave: named shapes with every op and dtype named beside them, else the defaults."""
    if shapes:
        wanted = {"token_logprobs": dtypes or ["bfloat16"], "policy_loss": dtypes or ["float32"]}
        every = [(op, shape, d) for op in ops or ["token_logprobs"] for shape in shapes for d in wanted[op]]
        return [spec for spec in every if spec[0] == "token_logprobs" or spec[2] == "float32"]
    specs = default_specs(device, small)
    return [spec for spec in specs if (not ops or spec[0] in ops) and (not dtypes or spec[2] in dtypes)]


def make(spec: tuple[str, tuple[int, int], str], device: str) -> Case:
    op, shape, dtype = spec
    return (logprob_case if op == "token_logprobs" else policy_case)(shape, dtype, device)
