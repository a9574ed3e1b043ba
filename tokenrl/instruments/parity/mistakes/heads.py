"""Mistakes of the log-probs: their temperature, their ids, their precision."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ....ops.linear.gemm import linear
from ...rollout_batch import RolloutBatch
from ..computation import Change, Computation
from .base import Mistake

SHIFTED = "ids shifted by one"
EDGES = {"": "around", "; the last one is left out": "out", "; the last one is 0": "zero"}


def has_head(computation: Computation) -> bool:
    return computation.batch.leaf != "logp"


def with_head(change: Callable[[RolloutBatch], RolloutBatch]) -> Change:
    """Log-probs, and entropies, of another head."""

    def changed(computation: Computation) -> Computation:
        logp, entropy = change(computation.batch).scored("reference")
        return replace(computation, logp=logp, entropy=entropy)

    return changed


def setting(**settings: object) -> Callable[[RolloutBatch], RolloutBatch]:
    def change(batch: RolloutBatch) -> RolloutBatch:
        kept = {name: x for name, x in batch.tensors.items() if name not in settings}
        return replace(batch, tensors=kept, settings={**batch.settings, **settings})

    return change


def is_tempered(computation: Computation) -> bool:
    batch = computation.batch
    return has_head(computation) and ("temperature" in batch.tensors or batch.settings.get("temperature", 1.0) != 1.0)


def inverse_temperature(batch: RolloutBatch) -> RolloutBatch:
    if "temperature" in batch.tensors:
        return replace(batch, tensors={**batch.tensors, "temperature": 1 / batch.tensors["temperature"]})
    return setting(temperature=1 / batch.settings["temperature"])(batch)


def heads() -> Iterator[Mistake]:
    yield Mistake("untempered log-probs", "temperature 1", with_head(setting(temperature=1.0)), is_tempered)
    how = "the logits are multiplied by it"
    yield Mistake("temperature the wrong way round", how, with_head(inverse_temperature), is_tempered)
    for shift, how in ((-1, "logits of t score the id of t + 1"), (1, "logits of t score the id of t - 1")):
        for edge in EDGES:
            yield Mistake(SHIFTED, f"{how}{edge}", shifted(shift, 0, edge), has_head)
    how = "as if logits of t were for the id of t + 1"
    for edge in EDGES:
        yield Mistake(SHIFTED, f"{how}{edge}", shifted(-1, 1, edge), has_head)


def _rolled(x: Tensor, shift: int) -> Tensor:
    """Along the tokens."""
    return x.roll(shift, dims=1 if x.dim() > 1 else 0)


def shifted(ids: int, back: int, edge: str) -> Change:
    """Ids rolled, then the log-probs rolled back; the token without a partner as `edge` says."""

    def change(computation: Computation) -> Computation:
        batch = computation.batch
        moved = {**batch.tensors, "ids": _rolled(batch.tensors["ids"].clamp(min=0), ids)}
        logp = _rolled(replace(batch, tensors=moved).log_probs("reference"), back)
        first = torch.zeros(logp.shape[-1], dtype=torch.bool).index_fill(0, torch.tensor([0]), True)
        lost = first.roll(ids if not back else 0) if ids < 0 else first
        lost = lost.expand(logp.shape)
        if EDGES[edge] == "zero":
            return replace(computation, logp=torch.where(lost, 0, logp))
        new = replace(computation, logp=logp)
        if EDGES[edge] == "around":
            return new
        mask = batch.tensors.get("mask", torch.ones_like(lost))
        return new.changed(mask=mask & ~lost)

    return change


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def logits_of(batch: RolloutBatch, dtype: torch.dtype) -> Tensor:
    if batch.leaf == "logits":
        return batch.tensors["logits"].to(dtype)
    bias = batch.tensors.get("bias")
    hidden, weight = (batch.tensors[name].to(dtype) for name in ("hidden", "weight"))
    return linear(hidden, weight, None if bias is None else bias.to(dtype))


def of_half_logits(computation: Computation, softmax: torch.dtype | None, first: bool) -> Computation:
    """softmax: the precision of the log-softmax, None: the computation's. first: rounded before the temperature."""
    batch, dtype = computation.batch, computation.logp.dtype
    temperature = batch.tensors.get("temperature", batch.settings.get("temperature", 1.0))
    temperature = temperature[..., None] if isinstance(temperature, Tensor) else temperature
    half = logits_of(batch, torch.bfloat16 if first else dtype) / temperature
    half = half.bfloat16()
    logp = torch.log_softmax(half.to(softmax or dtype), -1)
    logp = logp.gather(-1, batch.tensors["ids"].clamp(min=0)[..., None]).squeeze(-1)
    return replace(computation, logp=logp.to(dtype))


def is_bare(computation: Computation) -> bool:
    """Nothing but a temperature between logits and log-probs."""
    known = {**computation.batch.settings, **computation.batch.tensors}
    return has_head(computation) and not known.keys() & {"softcap", "logit_scale", "keep_mask"}


def halves() -> Iterator[Mistake]:
    name = "bf16 log-probs"
    yield Mistake(name, "rounded before the ratio", lambda c: replace(c, logp=rounded(c.logp)))

    def both(c: Computation) -> Computation:
        return replace(c, logp=rounded(c.logp)).changed(old_logp=rounded(c.batch.tensors["old_logp"]))

    yield Mistake(name, "new and old ones rounded", both, lambda c: "old_logp" in c.batch.tensors)
    for softmax, what in ((torch.bfloat16, "log-softmax in bf16"), (None, "logits in bf16")):
        for first, when in ((True, "before"), (False, "after")):
            change = functools.partial(of_half_logits, softmax=softmax, first=first)
            yield Mistake(name, f"{what}, rounded {when} the temperature", change, is_bare)
