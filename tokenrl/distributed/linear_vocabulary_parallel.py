"""linear_token_logprobs with a head whose rows lie side by side on the ranks of a group.

Each rank has its rows of the head and all hidden states; one all-gather of the whole call, whatever the tiles. The
backward computes the logits again, on each rank its own; gradients of weight and bias are whole, those of hidden shares
that are summed over the ranks, in fp32, by one all-reduce.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import wrong
from ..logprobs import from_logits
from ..logprobs.from_hidden import check_main_grad_backend
from ..logprobs.from_logits import OUTPUTS
from ..logprobs.token_stats import TokenStats
from ..ops import backends, dispatch, kernel_ops, linear_ops, ranges, reference
from ..ops.arguments import schema
from ..ops.backends import Backend
from ..ops.derivatives import call, once, register_derivative
from ..ops.kernel_ops import RESULTS, STATISTICS, SavedStatistics, Transform, Upstream
from ..ops.linear import token_logprobs as tiles
from ..ops.linear.gemm import sum_dtype
from ..ops.linear.head import HeadInputs, tiles_of
from ..ops.linear.kept import gradient_sums
from ..ops.linear.main_grad import MainGrad
from . import order
from .agreement import Agreement
from .exchange import Part, of_vocabulary
from .said import said_of
from .vocab_ranks import ShardInputs, VocabRanks
from .vocabulary_parallel import LIBRARY, NAMESPACE, ONCE, differentiable

if TYPE_CHECKING:
    from .vocab_shard import VocabShard

OP = "vocab_linear_token_logprobs"


def linear_token_logprobs(
    shard: "VocabShard", hidden: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None,
    temperature: float | Tensor, softcap: float | None, logit_scale: float, keep_mask: Tensor | None,
    row_mask: Tensor | None, ignore_index: int, outputs: Any, compute_dtype: torch.dtype | None,
    memory_budget: int | None, main_grad: Tensor | None, reduce_hidden_grad: bool, backend: str | None, check: bool,
) -> TokenStats:  # fmt: skip
    """tokenrl.linear_token_logprobs with vocab=shard."""
    with Agreement("linear_token_logprobs", shard.group, hidden.device, check) as agreed:
        head = shard.head_arguments(
            hidden, weight, bias, temperature, softcap, logit_scale, keep_mask, compute_dtype, memory_budget,
            main_grad,
        )  # fmt: skip
        from_logits.check_ids(head.like, ids, outputs)
        names = [name for name in OUTPUTS if name in outputs]
        for name in {*names} & {*order.NAMES}:
            raise wrong("outputs", f"{name!r} beside vocab", "those without an order, or token_logprobs of the logits")
        inputs = head.inputs(ids, row_mask, ignore_index)
        wanted = dispatch.wanted(inputs)
        agreed.same(
            rows=list(head.like.shape[:-1]), dtype=inputs.compute_dtype, sizes=shard.sizes, outputs=names,
            transform=said_of(head.transform), hidden_gradient=wanted[0], reduce_hidden_grad=reduce_hidden_grad,
        )  # fmt: skip
        agreed.contents(ids=inputs.ids)
        chosen = backends.choose(backend, hidden.device)
        check_main_grad_backend(main_grad, chosen)
        if not chosen.is_reference:
            check_budget(inputs, any(wanted))
    asked = [name for name in names if name not in kernel_ops.ALWAYS]
    rows = head.like.shape[:-1]
    given = shard.inputs(chosen, inputs, rows[:-1].numel(), reduce_hidden_grad)
    found = results(chosen, given, inputs, asked, head.main_grad)
    return TokenStats({name: found[name].view(ids.shape if name in kernel_ops.PER_ID else rows) for name in outputs})


def check_budget(inputs: HeadInputs, differentiable: bool) -> None:
    """Said before the first exchange: ranks of few columns may need less than others."""
    head, rows = inputs.head(None), inputs.ids.shape[0]
    tiles_of(head, rows, inputs.memory_budget, sums=gradient_sums(head, rows) if differentiable else 0)


def results(
    chosen: Backend, given: ShardInputs, inputs: HeadInputs, outputs: list[str], main_grad: Tensor | None
) -> Part:
    """Those of op linear_token_logprobs over the whole vocabulary, by name."""
    if not chosen.is_reference:
        return dict(zip(RESULTS, call(NAMESPACE, OP, *inputs, outputs, main_grad, *given), strict=True))
    ranks = VocabRanks(given)
    logits = reference.head_logits(replace(inputs, hidden=OfAllTokens.apply(inputs.hidden, given)))
    keep = None if inputs.keep_mask is None else inputs.keep_mask.expand(logits.shape)
    transform = Transform(inputs.temperature, inputs.temperatures, inputs.softcap, inputs.logit_scale, keep)
    own = differentiable(chosen, logits, ranks.own_ids(inputs.ids), transform, outputs)
    return of_vocabulary(own, inputs.ids, keep, outputs, ranks.group, given.sizes)


def _summed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ranks, shares = VocabRanks(ctx.given), grad.to(ctx.given.wire_dtype, copy=True)
    ranks.add_up(shares, slice(0, len(shares)))
    return ranks.finish(shares).to(grad.dtype), None


class OfAllTokens(torch.autograd.Function):
    """hidden, whose gradient is the sum of those of all ranks."""

    @staticmethod
    def forward(hidden: Tensor, given: ShardInputs) -> Tensor:
        return VocabRanks(given).hidden(hidden).view(-1, hidden.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, ctx.given = inputs
        ctx.save_for_backward(hidden)

    backward = staticmethod(once(_summed, "linear_token_logprobs beside vocab", ONCE))


SCHEMAS = {
    OP: schema(HeadInputs, "str[] outputs, Tensor? main_grad", ShardInputs, returns=STATISTICS),
    f"{OP}_backward": schema(
        HeadInputs,
        Upstream,
        SavedStatistics,
        "bool[] wanted, Tensor(a!)? main_grad",
        ShardInputs,
        returns=f"({linear_ops.GRADS})",
    ),
}


def _run(*args: Any) -> tuple[Tensor, ...]:
    inputs, (outputs, _, *rest) = HeadInputs.read(args)
    given, _ = ShardInputs.read(tuple(rest))
    ranks, head = VocabRanks(given), inputs.head(ranges.kernels(given.kernels))
    with torch.autocast(inputs.hidden.device.type, enabled=False), torch.no_grad():
        hidden, own = ranks.hidden(inputs.hidden), ranks.own_ids(inputs.ids)
        found = tiles.statistics(head, hidden, own, outputs, inputs.memory_budget)
        return tuple(ranks.merged(found, inputs.ids, inputs.keep_mask, outputs))


def _fake(*args: Any) -> tuple[Tensor, ...]:
    inputs, (outputs, *_) = HeadInputs.read(args)
    rows = inputs.hidden.new_empty(()).expand(inputs.ids.shape)  # of all tokens, where hidden is of some
    return kernel_ops.logprob_results(rows, inputs.ids, outputs, sum_dtype(inputs.dtype))


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    inputs, rest = HeadInputs.read(args)
    upstream, rest = Upstream.read(rest)
    saved, (wanted, main_grad, *shard) = SavedStatistics.read(rest)
    given, _ = ShardInputs.read(tuple(shard))
    ranks, dtypes = VocabRanks(given), linear_ops.dtypes_of(inputs)
    head, own = inputs.head(ranges.kernels(given.kernels)), ranks.own_ids(inputs.ids)
    with torch.autocast(inputs.hidden.device.type, enabled=False), torch.no_grad():
        whole = ranks.of_all_tokens(inputs)
        grads = linear_ops.gradients_of(whole, wanted, [given.wire_dtype, *dtypes[1:]], main_grad)
        tiles.gradients(head, tuple(upstream), whole.hidden, own, tuple(saved), inputs.memory_budget, grads)
        if grads.hidden is not None:
            ranks.add_up(grads.hidden, slice(0, len(own)))
        return tuple(ranks.results(grads, inputs.hidden, dtypes))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    inputs, rest = HeadInputs.read(args)
    _, rest = Upstream.read(rest)
    _, (wanted, main_grad, *_) = SavedStatistics.read(rest)
    wanted = [wanted[0], wanted[1] and main_grad is None, wanted[2]]
    return tuple(linear_ops.fake_results(inputs, wanted, linear_ops.dtypes_of(inputs)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    head, (_, main_grad, *ctx.shard) = HeadInputs.read(inputs)
    ctx.main_grad = MainGrad.of(main_grad, head.weight)
    _, entropy, lse, lse_rest, squares, *_ = output
    kernel_ops.mark_constants(ctx, output)
    ctx.tensors = [name for name, x in vars(head).items() if isinstance(x, Tensor)]
    ctx.given = {name: x for name, x in vars(head).items() if name not in ctx.tensors}
    ctx.save_for_backward(lse, lse_rest, entropy, squares, *(getattr(head, name) for name in ctx.tensors))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logp, grad_entropy, grad_lse, _, grad_squares, *_ = upstream
    wanted_of = Upstream(grad_logp, grad_entropy, grad_lse, grad_squares)
    if all(g is None for g in wanted_of):
        return None, None, None
    lse, lse_rest, entropy, squares, *tensors = ctx.saved_tensors
    inputs = HeadInputs(**ctx.given, **dict(zip(ctx.tensors, tensors, strict=True)))
    wanted = list(ctx.needs_input_grad[:3])
    op = getattr(ranges.kernels(NAMESPACE), f"{OP}_backward")
    total = None if ctx.main_grad is None else ctx.main_grad.total
    grads = list(op(*inputs, *wanted_of, lse, lse_rest, entropy, squares, wanted, total, *ctx.shard))
    if wanted[1] and ctx.main_grad is not None:
        grads[1] = ctx.main_grad.beside()
    return tuple(g if want else None for g, want in zip(grads, wanted, strict=True))


for _op, _run_op, _fake_op in ((OP, _run, _fake), (f"{OP}_backward", _run_backward, _fake_backward)):
    LIBRARY.define(_op + SCHEMAS[_op], tags=linear_ops.HOST_READS)
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_op, _run_op, _key)
    torch.library.register_fake(f"{NAMESPACE}::{_op}", _fake_op)
register_derivative(NAMESPACE, OP, _save, _backward, 3, ONCE)
