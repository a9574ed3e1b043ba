"""What the backends are compared with: each a call on the case's inputs, or the reason why it cannot run here."""

import functools
import importlib
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Case


@dataclass(frozen=True)
class Competitor:
    """call(*inputs) returns a tuple of tensors; None, with a reason, where it cannot run. backward: it has one.

    forward: one without the gradients. comparable: it computes what the op computes. remark: what a reader must know.
    """

    name: str
    call: Callable[..., tuple[Tensor, ...]] | None
    reason: str | None = None
    backward: bool = True
    forward: bool = True
    comparable: bool = True
    remark: str | None = None


def trl_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As a batch of up to 8 sequences: without a GPU it loops over them, far slower row by row."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    batch = math.gcd(ids.shape[0], 8)
    logp, entropy = selective_log_softmax_and_entropy(logits.view(batch, -1, logits.shape[-1]), ids.view(batch, -1))
    return logp.flatten(), entropy.flatten()


def liger_logprobs(logits: Tensor, ids: Tensor) -> tuple[Tensor]:
    """Log-probs only: Liger's op has neither an entropy nor a backward, and leaves out the last position."""
    from liger_kernel.transformers.grpo_loss import fused_selective_log_softmax

    padded, rows = logits.detach()[None], ids[None]
    return (fused_selective_log_softmax(padded, rows[:, :-1], temperature=1.0).squeeze(0),)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def why_not(package: str, pinned: str, module: str, *names: str) -> str | None:
    """Why what is compared with cannot be had from a module of an installed package; None where it can."""
    found = version(package)
    if found is None:
        return f"{package} is not installed (pip install {package}=={pinned})"
    try:
        missing = [name for name in names if not hasattr(importlib.import_module(module), name)]
    except Exception as error:  # whatever a foreign package's import raises is the reason
        return f"{package} {found} does not import: {first_line(error)}"
    return f"{package} {found} has no {', '.join(missing)} in {module}" if missing else None


def trl() -> Competitor:
    reason = why_not("trl", "1.16.0", "trl.trainer.utils", "selective_log_softmax_and_entropy")
    return Competitor("TRL", None if reason else trl_logprobs, reason)


def liger(device: str) -> Competitor:
    if device != "cuda":
        return Competitor("Liger", None, "liger-kernel's log-probs are Triton kernels only, which run CUDA tensors")
    module = "liger_kernel.transformers.grpo_loss"
    reason = why_not("liger-kernel", "0.8.5", module, "fused_selective_log_softmax")
    return Competitor("Liger", None if reason else liger_logprobs, reason, backward=False)


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"[:200]


def compiled(case: Case, wanted: bool) -> Competitor:
    """torch.compile of the eager spelling; the first call, in the check, pays for the compilation."""
    if not wanted:
        return Competitor("compile", None, "--no-compile")
    torch._dynamo.reset()
    return Competitor("compile", torch.compile(case.eager, dynamic=False))


def competitors(case: Case, device: str, compile: bool) -> list[Competitor]:
    """Those of a case that starts from logits or log-probs, in the order of the table."""
    found = [Competitor("eager", case.eager), compiled(case, compile)]
    if case.op == "token_logprobs":
        return [*found, trl(), liger(device)]
    if case.op == "token_divergence":
        return found
    return [*found, Competitor("reference", functools.partial(case.run, "reference"))]


def versions() -> str:
    """The versions of what is compared with, for the machine's line."""
    found = {package: version(package) for package in ("trl", "liger-kernel", "triton")}
    return ", ".join(f"{package} {number}" for package, number in found.items() if number) or "no competitor installed"
