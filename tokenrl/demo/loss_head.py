"""The loss head on a recorded batch: gradients on every backend against fp64, and time against eager PyTorch."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokenrl

from ..instruments.parity.held import Held, leaves_of
from ..ops.backends import BACKENDS
from .train import Recording, Rollouts


@dataclass(frozen=True)
class Parity:
    """A backend's relative L2 error of dloss/dlogits per objective, or the reason why it cannot run here."""

    backend: str
    device: str
    errors: dict[str, float]
    reason: str | None = None


def devices() -> list[torch.device]:
    """The devices of this machine that backends run on."""
    return [torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()]


def loss_head(
    name: str, recording: Recording, logits: Tensor, backend: str | None = None, token_weight: Tensor | None = None
) -> Tensor:
    """The loss of an objective through token_logprobs and policy_loss."""
    batch = recording.batch
    logp, _ = tokenrl.token_logprobs(logits, batch.ids, temperature=recording.temperature, backend=backend)
    loss, _ = tokenrl.policy_loss(
        name, logp, batch.old_logp, batch.advantages, mask=batch.mask, token_weight=token_weight, backend=backend
    )
    return loss


def eager_loss_head(name: str, recording: Recording, logits: Tensor) -> Tensor:
    """The same loss as trainers spell it in PyTorch, with the entropy and clip fraction that they log."""
    batch, mask, row = recording.batch, recording.batch.mask, tokenrl.objective(name)
    gate: Any = row.gate
    logp_all = torch.log_softmax(logits.float() / recording.temperature, -1)
    logp = logp_all.gather(-1, batch.ids.clamp(min=0)[..., None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(logp_all.exp() * logp_all).sum(-1)
        _ = (entropy * mask).sum() / mask.sum()
    log_ratio = torch.where(mask, logp - batch.old_logp, 0.0)
    advantages = batch.advantages[:, None]
    if name == "grpo":
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - gate.eps_low, 1 + gate.eps_high)
        loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    else:
        prefix = log_ratio.cumsum(1).detach() + log_ratio - log_ratio.detach()
        width = mask.cumsum(1).clamp(min=1) ** gate.power
        ratio = prefix.clamp(max=row.cap).exp()
        clipped = prefix.clamp(-gate.eps_low * width, gate.eps_high * width).exp()
        loss = torch.maximum(-advantages * ratio, -advantages * clipped)
        ceiling = -advantages * (gate.eps_dual * width).exp()
        loss = torch.where(advantages < 0, torch.minimum(loss, ceiling), loss)
    with torch.no_grad():
        _ = ((ratio != clipped) * mask).sum() / mask.sum()
    return ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def gradient(
    make_loss: Callable[..., Tensor], name: str, recording: Recording, dtype: torch.dtype, **more: Any
) -> Tensor:
    """dloss/dlogits, [B, T, V], with the logits cast to dtype."""
    logits = recording.logits.to(dtype).requires_grad_()
    return torch.autograd.grad(make_loss(name, recording, logits, **more), logits)[0]


def rollout_batch(recording: Recording, name: str) -> tokenrl.RolloutBatch:
    """The recording as instruments take it, under an objective."""
    batch, temperature = recording.batch, recording.temperature
    (logp,) = tokenrl.token_logprobs(recording.logits, batch.ids, temperature=temperature, outputs=("logp",))
    tensors = {
        "logits": recording.logits, "ids": batch.ids, "logp": logp, "old_logp": batch.old_logp, "mask": batch.mask,
        "advantages": batch.advantages, "rewards": batch.rewards, "group_ids": batch.group_ids,
    }  # fmt: skip
    return tokenrl.RolloutBatch(tensors, tokenrl.objective(name), {"temperature": temperature}, {})


def decided(name: str, recording: Recording) -> Tensor:
    """Weights fp32 [B, T]: 0 for tokens whose gradient rounding decides, at a clip edge, else 1."""
    batch = rollout_batch(recording, name)
    return (~Held(batch, leaves_of(batch)).undecided(torch.float32).tokens).float()


def relative_error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth| in L2."""
    return (torch.linalg.vector_norm(found.double().cpu() - truth.cpu()) / torch.linalg.vector_norm(truth.cpu())).item()


def moved(recording: Recording, device: torch.device) -> Recording:
    batch = Rollouts(**{name: value.to(device) for name, value in vars(recording.batch).items()})
    return dataclasses.replace(recording, batch=batch, logits=recording.logits.to(device))


def parity(recording: Recording, names: tuple[str, ...]) -> list[Parity]:
    """Each backend on each device where it can run: its gradients in fp32 against the fp64 reference."""
    recording = moved(recording, torch.device("cpu"))
    weights = {name: decided(name, recording) for name in names}
    truths = {name: _gradients(name, recording, weights, torch.float64, "reference") for name in names}
    rows = []
    for backend in BACKENDS.values():
        reasons = {device: backend.why_not(device) for device in devices()}
        for device in (device for device, reason in reasons.items() if reason is None):
            here = moved(recording, device)
            found = {name: _gradients(name, here, weights, torch.float32, backend.name) for name in names}
            errors = {name: relative_error(found[name], truths[name]) for name in names}
            rows.append(Parity(backend.name, device.type, errors))
        if all(reasons.values()):
            rows.append(Parity(backend.name, "", {}, next(reversed(reasons.values()))))
    return rows


def _gradients(name: str, recording: Recording, weights: dict[str, Tensor], dtype: torch.dtype, backend: str) -> Tensor:
    weight = weights[name].to(recording.logits.device, dtype)
    return gradient(loss_head, name, recording, dtype, backend=backend, token_weight=weight)


def widened(recording: Recording, rows: int = 64, vocabulary: int = 32000) -> Recording:
    """The first rows of a recording with logits of a real model's width: the other entries are normal numbers."""
    batch = Rollouts(**{name: value[:rows] for name, value in vars(recording.batch).items()})
    logits = recording.logits[:rows]
    generator = torch.Generator(device=logits.device).manual_seed(0)
    shape = (*logits.shape[:2], vocabulary - logits.shape[-1])
    others = torch.randn(shape, dtype=logits.dtype, device=logits.device, generator=generator)
    return dataclasses.replace(recording, batch=batch, logits=torch.cat([logits, others], -1))


def timings(name: str, recording: Recording, repeats: int) -> tuple[float, float]:
    """Median seconds, forward and backward, of (tokenrl on the default backend, eager) on a recording, in turns."""
    samples: tuple[list, list] = ([], [])
    for repeat in range(repeats + 2):
        for make_loss, taken in zip((loss_head, eager_loss_head), samples, strict=True):
            logits = recording.logits.detach().requires_grad_()
            begin = time.perf_counter()
            make_loss(name, recording, logits).backward()
            if logits.is_cuda:
                torch.cuda.synchronize()
            if repeat >= 2:
                taken.append(time.perf_counter() - begin)
    return tuple(map(statistics.median, samples))
