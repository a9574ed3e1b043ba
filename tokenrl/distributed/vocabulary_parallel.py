"""token_logprobs over a vocabulary that lies side by side on the ranks of a group.

Each rank runs the op on its own columns; one all-gather brings 3 + K numbers a row, and every rank merges them in fp64
in the order of ranks: the same bits on all. The backward is the op's own, with the merged statistics: no collective,
and the gradient of a rank's columns is whole.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import wire
from ..batch.checks import unit_stride
from ..logprobs import from_logits
from ..logprobs.from_logits import OUTPUTS
from ..logprobs.token_stats import TokenStats
from ..ops import backends, dispatch, kernel_ops, ranges
from ..ops.arguments import schema
from ..ops.backends import Backend
from ..ops.derivatives import call, once, register_derivative
from ..ops.kernel_ops import RESULTS, STATISTICS, Transform
from ..ops.linear.token_logprobs import ELSEWHERE
from . import order
from .agreement import Agreement
from .exchange import Part, in_order, of_vocabulary, shard_ids
from .said import said_of

if TYPE_CHECKING:
    from .vocab_shard import VocabShard

NAMESPACE, OP = "tokenrl_distributed", "vocab_token_logprobs"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
ONCE = "once (the second derivative of a rank's part is not its own alone)"


def token_logprobs(
    shard: "VocabShard", logits: Tensor, ids: Tensor, *, temperature: float | Tensor, softcap: float | None,
    logit_scale: float, keep_mask: Tensor | None, row_mask: Tensor | None, ignore_index: int, outputs: Any,
    backend: str | None, check: bool,
) -> TokenStats:  # fmt: skip
    """tokenrl.token_logprobs with vocab=shard."""
    with Agreement("token_logprobs", shard.group, logits.device, check) as agreed:
        logits, keep_mask = shard.own("logits", logits, -1), shard.own_keep(keep_mask, logits)
        like = logits.new_empty(()).expand(*logits.shape[:-1], shard.total)
        from_logits.check_ids(like, ids, outputs)
        transform = from_logits.as_transform(temperature, softcap, logit_scale, keep_mask, logits)
        ids = from_logits.aligned_ids(ids, row_mask, ignore_index, like)
        transform = from_logits.of_rows_read(transform, ids, ids.dim() == logits.dim())
        names = [name for name in OUTPUTS if name in outputs]
        agreed.same(
            rows=list(logits.shape[:-1]), dtype=logits.dtype, sizes=shard.sizes, outputs=names,
            transform=said_of(transform),
        )  # fmt: skip
        agreed.contents(ids=ids)
        chosen = backends.choose(backend, logits.device)
    rows, count = logits.shape[:-1], logits.shape[:-1].numel()
    flat = logits.reshape(count, logits.shape[-1]), ids.reshape(count, -1 if count else 1)
    found = _results(chosen, shard, *flat, _flat(transform, logits), names)
    shape = {name: ids.shape if name in kernel_ops.PER_ID else rows for name in names}
    return TokenStats({name: found[name].view(shape[name]) for name in outputs})


def _flat(transform: Transform, logits: Tensor) -> Transform:
    """For logits [N, V]."""
    temperatures, keep = transform.temperatures, transform.keep_mask
    if keep is not None:
        keep = keep.expand(logits.shape).reshape(logits.shape[:-1].numel(), logits.shape[-1])
    return replace(
        transform, temperatures=temperatures if temperatures is None else temperatures.reshape(-1), keep_mask=keep
    )


def _results(
    chosen: Backend, shard: "VocabShard", logits: Tensor, ids: Tensor, transform: Transform, names: list[str]
) -> Part:
    """Of logits [N, V_r] and ids [N, K] of the whole vocabulary."""
    asked = [name for name in names if name not in (*kernel_ops.ALWAYS, *order.NAMES)]
    logits = unit_stride(logits)
    if chosen.is_reference:
        local = shard_ids(ids, shard.sizes, shard.rank)
        own = differentiable(chosen, logits, local, transform, asked)
        found = of_vocabulary(own, ids, transform.keep_mask, asked, shard.group, shard.sizes)
    else:
        inputs = (*transform, asked, chosen.namespace, shard.group.group_name, shard.sizes)
        found = dict(zip(RESULTS, call(NAMESPACE, OP, logits, ids, *inputs), strict=True))
    if {*names} & {*order.NAMES}:
        found |= order.of(logits.detach(), ids, transform.keep_mask, shard.start, shard.size, shard.group)
    return found


def differentiable(chosen: Backend, logits: Tensor, local: Tensor, transform: Transform, outputs: list[str]) -> Part:
    """The own part's statistics by the reference; of rows that are -inf altogether, of which autograd makes NaN, those
    of nothing."""
    keep = transform.keep_mask
    dead = (logits == -torch.inf if keep is None else (logits == -torch.inf) | ~keep).all(-1)
    logits = torch.where(dead[:, None], 0, logits)
    transform = replace(transform, keep_mask=None if keep is None else keep | dead[:, None])
    logits, there = _Once.apply(logits), torch.where(local == ELSEWHERE, 0, local)
    own = dict(zip(RESULTS, dispatch.token_logprobs(chosen, logits, there, *transform, outputs, False), strict=True))
    minus_inf = ("lse", "mean_logit") if "mean_logit" in outputs else ("lse",)
    return own | {name: torch.where(dead, -torch.inf, own[name]) for name in minus_inf}


class _Once(torch.autograd.Function):
    """The own part, which the others' statistics, constants here, let autograd differentiate once."""

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    backward = staticmethod(once(lambda ctx, grad: (grad,), "token_logprobs beside vocab", ONCE))


SCHEMA = schema(
    "Tensor logits, Tensor ids", Transform, "str[] outputs, str kernels, str group, int[] sizes", returns=STATISTICS
)


def _run(logits: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    transform, (outputs, kernels, name, sizes) = Transform.read(rest)
    group, ops = wire.group_named(name), ranges.kernels(kernels)
    local = shard_ids(ids, sizes, group.rank())
    own = dict(zip(RESULTS, ops.token_logprobs(logits, local, *transform, outputs, False), strict=True))
    return in_order(of_vocabulary(own, ids, transform.keep_mask, outputs, group, sizes))


def _fake(logits: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, (outputs, *_) = Transform.read(rest)
    return kernel_ops.logprob_results(logits, ids, outputs, torch.promote_types(logits.dtype, torch.float32))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, *rest = inputs
    transform, (_, ctx.kernels, name, ctx.sizes) = Transform.read(tuple(rest))
    ctx.rank = wire.group_named(name).rank()
    ctx.numbers = transform.temperature, transform.softcap, transform.logit_scale
    _, entropy, lse, lse_rest, squares, *_ = output
    kernel_ops.mark_constants(ctx, output)
    ctx.save_for_backward(logits, ids, lse, lse_rest, entropy, squares, transform.temperatures, transform.keep_mask)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logp, grad_entropy, grad_lse, _, grad_squares, *_ = upstream
    wanted = (grad_logp, grad_entropy, grad_lse, grad_squares)
    if all(g is None for g in wanted):
        return (None,)
    logits, ids, *saved, temperatures, keep_mask = ctx.saved_tensors
    temperature, softcap, logit_scale = ctx.numbers
    local = shard_ids(ids, ctx.sizes, ctx.rank)
    given = (*(g if g is None else g.contiguous() for g in wanted), logits, local, *saved)
    transform = (temperature, temperatures, softcap, logit_scale, keep_mask)
    return (ranges.kernels(ctx.kernels).token_logprobs_backward(*given, *transform),)


LIBRARY.define(OP + SCHEMA)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl(OP, _run, _key)
torch.library.register_fake(f"{NAMESPACE}::{OP}", _fake)
register_derivative(NAMESPACE, OP, _save, _backward, accepted=ONCE)
