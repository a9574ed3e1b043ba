"""token_logprobs over a vocabulary that lies side by side on the ranks of a group.

Each rank runs the op on its own columns; one all-gather brings 3 + K numbers a row, and every rank merges them in fp64
in the order of ranks: the same bits on all. The backward is the op's own, with the merged statistics: no collective,
and the gradient of a rank's columns is whole.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..logprobs import from_logits
from ..logprobs.from_logits import IGNORED, OUTPUTS, TokenStats
from ..ops import backends, dispatch, kernel_ops, ranges
from ..ops.arguments import schema
from ..ops.backends import Backend
from ..ops.derivatives import call, register_derivative
from ..ops.kernel_ops import RESULTS, STATISTICS, Transform
from ..ops.linear.token_logprobs import ELSEWHERE, local_ids, merged
from . import order, wire
from .agreement import Agreement

if TYPE_CHECKING:
    from .vocab_shard import VocabShard

NAMESPACE, OP = "tokenrl_distributed", "vocab_token_logprobs"
SUMMED_ROWS = 64  # whose kept logits are counted at a time, as a sum of bools copies them
Part = dict[str, Tensor]


def token_logprobs(
    shard: "VocabShard", logits: Tensor, ids: Tensor, *, temperature: float | Tensor, softcap: float | None,
    logit_scale: float, keep_mask: Tensor | None, row_mask: Tensor | None, ignore_index: int, outputs: Any,
    backend: str | None, check: bool,
) -> TokenStats:  # fmt: skip
    """tokenrl.token_logprobs with vocab=shard."""
    with Agreement("token_logprobs", shard.group, logits.device, check) as agreed:
        logits = shard.own("logits", logits, -1)
        like = logits.new_empty(()).expand(*logits.shape[:-1], shard.total)
        from_logits.check_ids(like, ids, outputs)
        keep_mask = None if keep_mask is None else shard.own("keep_mask", keep_mask, -1)
        transform = from_logits.as_transform(temperature, softcap, logit_scale, keep_mask, logits)
        ids = from_logits.aligned_ids(ids, row_mask, ignore_index, like)
        transform = from_logits.of_rows_read(transform, ids, ids.dim() == logits.dim())
        names = [name for name in OUTPUTS if name in outputs]
        agreed.same(
            rows=list(logits.shape[:-1]), dtype=logits.dtype, sizes=shard.sizes, outputs=names,
            transform=_text(transform), kept=keep_mask is not None,
        )  # fmt: skip
        agreed.contents(ids=ids)
    count = logits.shape[:-1].numel()
    flat = logits.reshape(count, shard.size), ids.reshape(count, -1 if count else 1)
    transform = _flat(transform, logits)
    found = _results(backends.choose(backend, logits.device), shard, *flat, transform, names)
    rows = logits.shape[:-1]
    shape = {name: ids.shape if name in kernel_ops.PER_ID else rows for name in names}
    return TokenStats({name: found[name].view(shape[name]) for name in outputs})


def _text(transform: Transform) -> str:
    per_row = "" if transform.temperatures is None else " per row"
    return f"{transform.temperature}{per_row} {transform.softcap} {transform.logit_scale}"


def _flat(transform: Transform, logits: Tensor) -> Transform:
    """For logits [N, V]."""
    temperatures, keep = transform.temperatures, transform.keep_mask
    temperatures = None if temperatures is None else temperatures.reshape(-1)
    keep = None if keep is None else keep.expand(logits.shape).reshape(logits.shape[:-1].numel(), logits.shape[-1])
    return Transform(transform.temperature, temperatures, transform.softcap, transform.logit_scale, keep)


def _results(
    chosen: Backend, shard: "VocabShard", logits: Tensor, ids: Tensor, transform: Transform, names: list[str]
) -> Part:
    """Of logits [N, V_r] and ids [N, K] of the whole vocabulary."""
    asked = [name for name in names if name not in (*kernel_ops.ALWAYS, *order.NAMES)]
    logits = logits if logits.stride(-1) == 1 or not logits.numel() else logits.contiguous()
    if chosen.is_reference:
        found = _by_reference(chosen, shard, logits, ids, transform, asked)
    else:
        inputs = (*transform, asked, chosen.namespace, shard.group.group_name, shard.sizes)
        found = dict(zip(RESULTS, call(NAMESPACE, OP, logits, ids, *inputs), strict=True))
    if {*names} & {*order.NAMES}:
        found |= order.of(logits.detach(), ids, transform.keep_mask, shard.start, shard.group)
    return found


def _by_reference(
    chosen: Backend, shard: "VocabShard", logits: Tensor, ids: Tensor, transform: Transform, outputs: list[str]
) -> Part:
    """Autograd's: the own part is differentiable, the others are constants."""
    own = _nothing(logits, ids, outputs)
    own["lse"] = own["lse"] + logits.sum(-1)  # of no columns 0, whose gradient is that of no columns
    if shard.size:
        own = _differentiable(chosen, logits, shard_ids(ids, shard.start, shard.size), transform, outputs)
    with torch.no_grad():
        parts = _exchanged(own, logits, ids, transform.keep_mask, outputs, shard.group, shard.sizes)
    parts[shard.rank] |= {name: own[name] for name in (*kernel_ops.ALWAYS, *outputs)}
    return _of_used(merged(parts, ids, outputs), ids, own["lse"].dtype)


def _differentiable(chosen: Backend, logits: Tensor, local: Tensor, transform: Transform, outputs: list[str]) -> Part:
    """The own part's statistics; of rows that are -inf altogether, of which autograd makes NaN, those of nothing."""
    keep = transform.keep_mask
    dead = (logits == -torch.inf if keep is None else (logits == -torch.inf) | ~keep).all(-1)
    logits = torch.where(dead[:, None], 0, logits)
    transform = replace(transform, keep_mask=None if keep is None else keep | dead[:, None])
    there = torch.where(local == ELSEWHERE, 0, local)
    found = dispatch.token_logprobs(chosen, logits, there, *transform, outputs, False)
    own = dict(zip(RESULTS, found, strict=True))
    return own | {"lse": torch.where(dead, -torch.inf, own["lse"])}


def shard_ids(ids: Tensor, start: int, size: int) -> Tensor:
    """ids of the whole vocabulary as those of a part of it."""
    return local_ids(ids, slice(start, start + size))


def _nothing(logits: Tensor, ids: Tensor, outputs: list[str]) -> Part:
    """The statistics of no logits."""
    found = kernel_ops.logprob_results(logits, ids, outputs, torch.promote_types(logits.dtype, torch.float32))
    part = {name: torch.zeros_like(x) for name, x in zip(RESULTS, found, strict=True)}
    return part | {"lse": torch.full_like(part["lse"], -torch.inf)}


def _exchanged(
    own: Part, logits: Tensor, ids: Tensor, keep_mask: Tensor | None, outputs: list[str], group: Any, sizes: list[int]
) -> list[Part]:
    """Of every rank what merged() takes, by one all-gather."""
    sent = {name: own[name] for name in (*kernel_ops.ALWAYS, *outputs)}
    if "mean_logit" in outputs and keep_mask is not None:
        kept = [some.sum(-1) for some in keep_mask.split(SUMMED_ROWS)] if len(ids) else [ids.new_empty(0)]
        sent["kept"] = torch.cat(kept).to(own["lse"].dtype)
    widths = [x[0].numel() if x.dim() > 1 else 1 for x in sent.values()]
    packed = torch.cat([x.reshape(len(ids), width) for x, width in zip(sent.values(), widths, strict=True)], 1)
    parts, start = [], 0
    for of_rank, size in zip(wire.all_gather(packed, group), sizes, strict=True):
        columns = zip(sent.items(), of_rank.split(widths, 1), strict=True)
        part = {name: found.reshape(x.shape) for (name, x), found in columns}
        part["here"] = (ids >= start) & (ids < start + size)
        part.setdefault("kept", torch.full_like(part["lse"], size))
        parts.append(part)
        start += size
    return parts


def _of_used(found: Part, ids: Tensor, dtype: torch.dtype) -> Part:
    """0 in rows all of whose ids are ignored; in the results' own dtype."""
    used = (ids != IGNORED).any(-1)
    return {
        name: torch.where(used[:, None] if x.dim() > 1 else used, x, 0).to(dtype) if x.numel() else x.to(dtype)
        for name, x in found.items()
    }


SCHEMA = schema(
    "Tensor logits, Tensor ids", Transform, "str[] outputs, str kernels, str group, int[] sizes", returns=STATISTICS
)


def _run(logits: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    transform, (outputs, kernels, name, sizes) = Transform.read(rest)
    group = wire.group_named(name)
    start, size = sum(sizes[: group.rank()]), sizes[group.rank()]
    own = _nothing(logits, ids, outputs)
    if size:
        ops, local = ranges.kernels(kernels), shard_ids(ids, start, size)
        own = dict(zip(RESULTS, ops.token_logprobs(logits, local, *transform, outputs, False), strict=True))
    parts = _exchanged(own, logits, ids, transform.keep_mask, outputs, group, sizes)
    found = _of_used(merged(parts, ids, outputs), ids, own["lse"].dtype)
    orders = {"is_top1": torch.bool, "rank": torch.int64}
    return tuple(found[name].to(orders.get(name, found[name].dtype)) for name in RESULTS)


def _fake(logits: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, (outputs, *_) = Transform.read(rest)
    return kernel_ops.logprob_results(logits, ids, outputs, torch.promote_types(logits.dtype, torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, *rest = inputs
    transform, (_, ctx.kernels, name, sizes) = Transform.read(tuple(rest))
    rank = wire.group_named(name).rank()
    ctx.start, ctx.size = sum(sizes[:rank]), sizes[rank]
    ctx.numbers = transform.temperature, transform.softcap, transform.logit_scale
    _, entropy, lse, lse_rest, squares, *_ = output
    kernel_ops.mark_constants(ctx, output)
    ctx.save_for_backward(logits, ids, lse, lse_rest, entropy, squares, transform.temperatures, transform.keep_mask)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logp, grad_entropy, grad_lse, _, grad_squares, *_ = upstream
    wanted = (grad_logp, grad_entropy, grad_lse, grad_squares)
    logits, ids, *saved, temperatures, keep_mask = ctx.saved_tensors
    if all(g is None for g in wanted):
        return (None,)
    if not ctx.size:
        return (torch.zeros_like(logits),)
    temperature, softcap, logit_scale = ctx.numbers
    local = shard_ids(ids, ctx.start, ctx.size)
    given = (*(g if g is None else g.contiguous() for g in wanted), logits, local, *saved)
    transform = (temperature, temperatures, softcap, logit_scale, keep_mask)
    return (ranges.kernels(ctx.kernels).token_logprobs_backward(*given, *transform),)


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    library.define(OP + SCHEMA)
    for key in ("CPU", "CUDA"):
        library.impl(OP, _run, key)
    torch.library.register_fake(f"{NAMESPACE}::{OP}", _fake)
    register_derivative(NAMESPACE, OP, _save, _backward)
    return library


_LIBRARY = _register()
