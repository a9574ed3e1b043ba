"""token_divergence of two heads whose columns lie side by side on the ranks of a group.

Each rank runs the op on its own columns of both. A kind that weighs logs takes one exchange of 5 numbers a row; any
other one of 4, after which each rank knows what its columns add, and one of 3. The backward is the op's own, with the
statistics and sums of the vocabulary: no collective.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import wire
from ..batch.checks import unit_stride
from ..logprobs.divergence import checked_pair
from ..objectives.divergences import Divergence
from ..ops import backends, divergence_ops, ranges, reference
from ..ops.arguments import schema
from ..ops.backends import Backend
from ..ops.derivatives import call, once, register_derivative
from ..ops.divergence_ops import DivergenceInputs
from ..ops.kernel_ops import Transform
from .agreement import Agreement
from .divergence_exchange import of_vocabulary, whole_lse
from .said import said_of
from .vocabulary_parallel import LIBRARY, NAMESPACE, ONCE

if TYPE_CHECKING:
    from .vocab_shard import VocabShard

OP = "vocab_divergence"
SCHEMA = schema(
    "Tensor logits, Tensor other_logits, Tensor? statistics", DivergenceInputs, "str kernels, str group",
    returns="(Tensor value, Tensor by_p, Tensor by_r, Tensor statistics)",
)  # fmt: skip


def token_divergences(
    shard: "VocabShard", kinds: Sequence[Divergence], pair: tuple[Tensor, Tensor], options: Sequence[tuple[Any, ...]],
    row_mask: Tensor | None, backend: str | None, check: bool,
) -> list[Tensor]:  # fmt: skip
    """tokenrl.token_divergence with vocab=shard. options: temperature, softcap, logit_scale, keep_mask of either."""
    with Agreement("token_divergence", shard.group, pair[0].device, check) as agreed:
        own, other = (shard.own(name, x, -1) for name, x in zip(("logits", "other_logits"), pair, strict=True))
        how = [(*some, shard.own_keep(keep, own)) for *some, keep in options]
        logits, other_logits, rows, transforms = checked_pair(own, other, how, row_mask)
        agreed.same(
            rows=list(own.shape[:-1]), dtype=own.dtype, sizes=shard.sizes, kinds=list(kinds),
            transforms=[said_of(x) for x in transforms],
        )  # fmt: skip
        if rows is not None:
            agreed.contents(row_mask=rows)
        chosen = backends.choose(backend, own.device)
    shape, count = own.shape[:-1], own.shape[:-1].numel()
    flat = [x.reshape(count, x.shape[-1]) for x in (logits, other_logits)]
    rows = None if rows is None else rows.reshape(-1)
    found = _results(chosen, shard.group, flat, rows, [_flat(x, count) for x in transforms], kinds)
    return [value.view(shape) for value in found]


def _flat(transform: Transform, count: int) -> Transform:
    temperature, temperatures, softcap, logit_scale, keep = transform
    temperatures = None if temperatures is None else temperatures.reshape(-1)
    keep = None if keep is None else keep.reshape(count, keep.shape[-1])
    return Transform(temperature, temperatures, softcap, logit_scale, keep)


def _results(
    chosen: Backend, group: dist.ProcessGroup, pair: Sequence[Tensor], rows: Tensor | None,
    transforms: Sequence[Transform], kinds: Sequence[Divergence],
) -> list[Tensor]:  # fmt: skip
    if chosen.is_reference:
        return by_reference(group, pair, rows, transforms, kinds)
    values, statistics, both = [], None, [unit_stride(x) for x in pair]
    for kind in kinds:
        given = rows, *transforms[0], *transforms[1], kind.name, kind.params()  # DivergenceInputs
        inputs = *given, chosen.namespace, group.group_name
        value, _, _, statistics = call(NAMESPACE, OP, *both, statistics, *inputs)
        values.append(value)
    return values


def by_reference(
    group: dist.ProcessGroup, pair: Sequence[Tensor], rows: Tensor | None, transforms: Sequence[Transform],
    kinds: Sequence[Divergence],
) -> list[Tensor]:  # fmt: skip
    """In differentiable torch, of logits [N, V_r]: autograd's derivative of the own terms under both lse of the
    vocabulary, and by these, on which every rank's terms depend."""
    z = [reference.divergence_logits(x, rows, how) for x, how in zip(pair, transforms, strict=True)]
    own = [_own_lse(x) for x in z]
    nothing = torch.zeros_like(own[0])
    parts = wire.all_gather(torch.stack([own[0].detach(), nothing, own[1].detach(), nothing]), group)
    constant = whole_lse(parts).to(nothing.dtype).unbind(0)
    lse = []
    for side, of_own in enumerate(own):
        of_ranks = [*parts[:, 2 * side]]
        of_ranks[group.rank()] = of_own
        lse.append(torch.stack(of_ranks).logsumexp(0))
    values = []
    for kind in kinds:
        with torch.enable_grad():
            at = [x.detach().requires_grad_() for x in constant]
            terms = _terms(kind, [x.detach() for x in z], at)
            by = torch.autograd.grad(terms.sum(), at)
        sums = wire.all_gather(torch.stack([terms.detach(), *by]), group).double().sum(0).to(terms.dtype)
        value = _Summed.apply(_terms(kind, z, constant), *lse, *sums)
        odd = (constant[0] - constant[0]) + (constant[1] - constant[1])  # a kind may select NaN away
        values.append(value + odd if rows is None else torch.where(rows, value + odd, 0))
    return values


def _own_lse(z: Tensor) -> Tensor:
    """Of rows that are -inf altogether, of which autograd makes NaN, a constant."""
    dead = (z == -torch.inf).all(-1)
    return torch.where(dead, -torch.inf, torch.where(dead[:, None], 0, z).logsumexp(-1))


def _terms(kind: Divergence, z: Sequence[Tensor], lse: Sequence[Tensor]) -> Tensor:
    log_p, log_r = (reference.log_probs_under(x, of[:, None]) for x, of in zip(z, lse, strict=True))
    return kind.terms(log_p, log_r).sum(-1)


def _by_own_columns(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    by_lse_p, by_lse_r, *_ = ctx.saved_tensors
    return grad, grad * by_lse_p, grad * by_lse_r, None, None, None


class _Summed(torch.autograd.Function):
    """The sum over ranks, with the derivatives that the own columns have in it."""

    @staticmethod
    def forward(own: Tensor, lse_p: Tensor, lse_r: Tensor, total: Tensor, by_lse_p: Tensor, by_lse_r: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        own, lse_p, lse_r, _, *by = inputs
        ctx.save_for_backward(*by, own, lse_p, lse_r)

    backward = staticmethod(once(_by_own_columns, "token_divergence beside vocab", ONCE))


def _run(logits: Tensor, other_logits: Tensor, statistics: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    given, (kernels, name) = DivergenceInputs.read(rest)
    found = of_vocabulary(ranges.kernels(kernels), wire.group_named(name), logits, other_logits, statistics, given)
    return *found[:3], found[3] if statistics is None else found[3].clone()


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return divergence_ops.divergence_results(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *of_op, ctx.kernels, _ = inputs
    divergence_ops.save_divergence(ctx, tuple(of_op), output)


def _backward(ctx: Any, grad: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = divergence_ops.divergence_backward(ctx.kernels)(ctx, grad, *rest)
    return found


LIBRARY.define(OP + SCHEMA)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl(OP, _run, _key)
torch.library.register_fake(f"{NAMESPACE}::{OP}", _fake)
register_derivative(NAMESPACE, OP, _save, _backward, 2, ONCE)
