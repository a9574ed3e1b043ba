"""The head of a batch on the reference, in parts of its tokens, so that few rows of logits are held in fp64."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...objectives.policy import OBJECTIVES
from ...ops.linear.gemm import linear
from ..progress import tracked
from ..rollout_batch import FIXED, TRANSFORM, RolloutBatch
from .computation import HEADS, Change, Computation, as_it_is, with_leaves

ENTRIES = 1 << 23  # of logits in a part
OF_HEAD = (*HEADS, "ids", "temperature", "keep_mask")
Scores = tuple[Tensor, Tensor | None]  # log-probs, and entropies where the loss takes these from the head


def head_of(batch: RolloutBatch, dtype: torch.dtype | None) -> RolloutBatch:
    """The head alone, in a precision (None: its own), its tokens in one row, under no objective in particular."""
    lead, found = batch.tokens.dim(), {}
    for name in OF_HEAD:
        if (x := batch.tensors.get(name)) is None:
            continue
        if dtype is not None and x.is_floating_point() and name in FIXED:
            x = x.to(dtype)  # once, and the others part by part
        whole = name in FIXED or (name == "keep_mask" and x.dim() == 1)
        found[name] = x if whole else x.reshape(1, batch.tokens.numel(), *x.shape[lead:])
    names = (*TRANSFORM, "entropy_coef") if batch.entropy_of_head else TRANSFORM
    settings = {name: batch.settings[name] for name in names if name in batch.settings}
    return RolloutBatch(found, OBJECTIVES["reinforce"], settings, {})


def parts(head: RolloutBatch, dtype: torch.dtype | None, doing: str) -> Iterator[tuple[slice, RolloutBatch]]:
    """(which tokens, their head)"""
    vocabulary = (head.tensors["logits"] if head.leaf == "logits" else head.tensors["weight"].t()).shape[-1]
    count, rows = head.tokens.numel(), max(1, ENTRIES // vocabulary)

    def of(name: str, x: Tensor, some: slice) -> Tensor:
        if name in FIXED or (name == "keep_mask" and x.dim() == 1):
            return x
        return x[:, some].to(dtype) if dtype is not None and x.is_floating_point() else x[:, some]

    for begin in tracked(range(0, max(count, 1), rows), lambda begin: f"{doing}, {begin:,} of {count:,} tokens"):
        some = slice(begin, min(begin + rows, count))
        yield some, head.mapped(lambda name, x, some=some: of(name, x, some))  # type: ignore[misc]


def scores(batch: RolloutBatch, dtype: torch.dtype | None, eager: bool = False) -> Scores:
    """Of the tokens, without a graph. eager: by torch's log_softmax, as trainers write it."""
    if batch.leaf == "logp":
        logp = batch.tensors["logp"]
        return logp if dtype is None else logp.to(dtype), None
    found = []
    with torch.no_grad():
        for _, part in parts(head_of(batch, dtype), dtype, "log-probs"):
            found.append(eager_scores(part, *leaves_in(part)) if eager else part.scored("reference"))
    shape, entropies = batch.tokens.shape, [entropy for _, entropy in found if entropy is not None]
    logp = torch.cat([logp for logp, _ in found], 1).view(shape)
    return logp, torch.cat(entropies, 1).view(shape) if entropies else None


def leaves_in(batch: RolloutBatch) -> list[Tensor]:
    return [batch.tensors[name] for name in HEADS if name in batch.tensors]


def eager_scores(batch: RolloutBatch, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Scores:
    """As trainers write it: logits, an fp32 copy, log_softmax, gather. x: logits, hidden states or log-probs."""
    if batch.leaf == "logp":
        return x, None
    z = x if weight is None else linear(x, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    how = batch.arguments(TRANSFORM)
    if how.get("logit_scale", 1.0) != 1:
        z = z * how["logit_scale"]
    if how.get("softcap"):
        z = how["softcap"] * torch.tanh(z / how["softcap"])
    temperature = how.get("temperature", 1.0)
    if isinstance(temperature, Tensor):
        z = z / temperature[..., None]
    elif temperature != 1:
        z = z / temperature
    if "keep_mask" in how:
        z = z.masked_fill(~how["keep_mask"], -math.inf)
    entropy = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1) if batch.entropy_of_head else None
    ids = batch.tensors["ids"].clamp(min=0)
    return torch.log_softmax(z, -1).gather(-1, ids[..., None]).squeeze(-1), entropy


Part = tuple[slice, dict[str, Tensor]]


def pulled_back(
    batch: RolloutBatch, leaves: Sequence[str], dtype: torch.dtype | None, by: Scores, change: Change = as_it_is
) -> Iterator[Part]:
    """(which tokens, their rows of the gradients by `leaves`), then (no token, the gradients by weight and bias).

    by: the gradients by log-probs and entropies. change: of the head; then it is one part."""
    rows = tuple(None if x is None else x.reshape(1, -1) for x in by)
    if leaves == ("logp",) and change is as_it_is:
        yield slice(None), {"logp": by[0].flatten()}
        return
    sums: dict[str, Tensor] = {}
    for some, outputs, given in _scored(batch, leaves, dtype, change):
        pairs = [(x, y[:, some]) for x, y in zip(outputs, rows, strict=True) if x is not None and y is not None]
        pairs = [(x, y.view(x.shape).to(x.dtype)) for x, y in pairs if x.requires_grad]
        wanted, upstream = [x for x, _ in pairs], [y for _, y in pairs]
        found = [torch.zeros_like(x) for x in given]
        if wanted:
            found = list(torch.autograd.grad(wanted, given, upstream, allow_unused=True, materialize_grads=True))
        gradients = dict(zip(leaves, found, strict=True))
        for name in [name for name in leaves if name in FIXED]:
            x = gradients.pop(name)
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            sums[name] = sums[name].add_(wide) if name in sums else wide
        flat = {name: x.flatten(0, -2) if name in HEADS else x.flatten() for name, x in gradients.items()}
        yield some, flat
    yield slice(0, 0), {name: x.to(dtype or batch.tensors[name].dtype) for name, x in sums.items()}


def _scored(
    batch: RolloutBatch, leaves: Sequence[str], dtype: torch.dtype | None, change: Change
) -> Iterator[tuple[slice, Scores, list[Tensor]]]:
    """(which tokens, their scores with a graph, what it begins with)"""
    if change is not as_it_is:
        whole = with_leaves(batch if dtype is None else batch.cast(dtype), leaves)
        changed = change(Computation(whole, whole.objective, *whole.scored("reference")))
        yield slice(None), (changed.logp, changed.entropy), [whole.tensors[name] for name in leaves]
        return
    for some, part in parts(head_of(batch, dtype), dtype, "gradients"):
        part = with_leaves(part, leaves)
        yield some, part.scored("reference"), [part.tensors[name] for name in leaves]
