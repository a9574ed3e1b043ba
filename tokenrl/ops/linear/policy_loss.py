"""linear_policy_loss: loss and gradients from hidden states in one pass over chunks of tokens.

A chunk's logits give its log-probs, these the objective's coefficients, these the gradient of its logits in their own
place, and that its share of the gradients of hidden and weight: 6 N D V flops, where recomputing the logits takes 8.
That needs a coefficient to depend on no later chunk. Statistics of a token or a prefix with flow "local" never do;
for the others chunks end where sequences do. Where a sequence does not fit into a chunk, or hardly any row into the
budget, two passes over tiles do the same (tokenrl/ops/linear/token_logprobs.py).

A frozen head needs no sequence to fit: hidden's gradient is made before the coefficients are known (directions.py),
4 N D V flops in one pass, where two take 6. With an entropy term that would cost what the second pass does.
"""

from typing import Any

import torch
from torch import Tensor

from ..kernel_ops import IGNORED
from . import token_logprobs
from .directions import directions, has_directions
from .evaluation import Evaluated, LinearPolicyLossInputs
from .gemm import ProductSum, multiples, sum_bytes, sum_dtype
from .head import FEWEST_TOKENS, Head, compacted, even, most_whole_rows, rows_at, split
from .ranks import ONE, OneRank, chunks_of
from .token_logprobs import Gradients

WORTH_CUTTING = 4  # chunks, where one is exchanged while the next is made: all but the last exchange are hidden
WORTH_EXCHANGING = 1024  # tokens of each


def run(
    ops: Any, inputs: LinearPolicyLossInputs, grads: Gradients, ranks: OneRank = ONE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics [12 of the objective, KL, entropy, passes], log-probs [N], entropies [N]); fills grads, of hidden
    with sums that ranks.finish ends. Tokens that the mask leaves out enter no GEMM: their log-probs and entropies are
    0."""
    wanted = any(g is not None for g in (grads.hidden, grads.weight, grads.bias))
    index, count = compacted(inputs.active)
    head = inputs.head(ops)
    summed = ranks.summed(sum_bytes(grads.weight, head.dtype))
    chunks = _chunks(inputs, ranks.widest(head), count, summed, ranks.at_once) if wanted else None
    once = chunks is None and _has_directions(inputs, ranks, head, count, grads)
    if chunks:
        evaluated = _one_pass(inputs, head, index, chunks, grads, ranks)
    elif once:
        evaluated = _by_directions(inputs, head, grads, ranks)
    else:
        evaluated = _two_passes(inputs, head, grads if wanted else None, ranks)
    metrics, kl, entropy = evaluated.metrics
    passes = metrics.new_full((), 2 if wanted and chunks is None and not once else 1)
    raw = torch.cat([metrics, torch.stack([kl.double(), entropy.double(), passes])])
    return evaluated.loss, raw, evaluated.logp, evaluated.entropy


def rows_of_chunk(head: Head, count: int, budget: int, sums: int) -> int:
    """The most tokens of a chunk of so many; 0 where too few fit. sums: of the weight's gradients."""
    fit = most_whole_rows(head, count, budget, sums)
    return 0 if fit < min(count, FEWEST_TOKENS) else fit


def _chunks(inputs: LinearPolicyLossInputs, head: Head, count: int, sums: int, at_once: int) -> list[slice] | None:
    """Parts of the active tokens, cut where the objective allows it; None if too few tokens fit into one."""
    if count == 0:
        return []
    alone = rows_of_chunk(head, count, inputs.memory_budget, sums)
    fits = [alone]
    if at_once > 1:
        several = rows_of_chunk(head, count, inputs.memory_budget // at_once, 0)
        fits = [
            min(several, max(-(-count // WORTH_CUTTING), WORTH_EXCHANGING)),
            several,
            alone if alone >= count else 0,
        ]
    return next((chunks for fit in fits if fit and (chunks := _cut(inputs, count, fit)) is not None), None)


def _cut(inputs: LinearPolicyLossInputs, count: int, fit: int) -> list[slice] | None:
    """Of at most `fit` tokens each; None where a sequence that must be whole has more."""
    if fit >= count or not inputs.looks_ahead:
        return list(split(count, even(count, fit)))
    active = torch.cat([inputs.cu_seqlens.new_zeros(1), inputs.active.cumsum(0)])
    begin, last, chunks = 0, 0, []
    for end in active[inputs.cu_seqlens[1:]].tolist():
        if end - last > fit:
            return None
        if end - begin > fit:
            chunks.append(slice(begin, last))
            begin = last
        last = end
    return [*chunks, slice(begin, count)]


def _one_pass(
    inputs: LinearPolicyLossInputs, head: Head, index: Tensor | None, chunks: list[slice], grads: Gradients,
    ranks: OneRank,
) -> Evaluated:  # fmt: skip
    """The loss, and the gradients, chunk by chunk."""
    ids, count = inputs.ids.squeeze(1), inputs.ids.shape[0]
    logp, entropy = (inputs.hidden.new_zeros(count, dtype=sum_dtype(head.dtype)) for _ in range(2))
    ends = [chunk.stop for chunk in chunks]
    if index is not None:
        ends = [last + 1 for last in index[[end - 1 for end in ends]].tolist()]
    # The last chunk's evaluation is that of the whole batch; on-policy every log ratio is 0, the later ones too.
    ends[-1] = count
    if inputs.old_logp is None:
        ends = [count] * len(ends)
    weight_sum = None
    if grads.weight is not None:
        weight_sum = ProductSum(grads.weight, head.dtype, once=len(chunks) == 1, adds=grads.adds)
    rows = [rows_at(index, at) for at in chunks]
    for chunk, at, end in zip(chunks_of(head, inputs.hidden, ids, rows, ranks), rows, ends, strict=True):
        if chunk.logp.numel() == count:
            logp, entropy = chunk.logp, chunk.entropy
        else:
            logp[at], entropy[at] = chunk.logp, chunk.entropy
        evaluated = inputs.evaluate(head.ops, logp[:end], entropy[:end])
        chunk.backward(evaluated.grad_logp, evaluated.grad_entropy, weight_sum, grads)
        if grads.hidden is not None:
            ranks.add_up(grads.hidden, at)
    if weight_sum is not None:
        weight_sum.finish()
    return evaluated


def _has_directions(inputs: LinearPolicyLossInputs, ranks: OneRank, head: Head, count: int, grads: Gradients) -> bool:
    """Whether they are all that the gradients need, and fit."""
    alone = grads.hidden is not None and grads.weight is None and grads.bias is None and inputs.entropy_coef == 0
    return alone and has_directions(ranks.widest(head), count, inputs.memory_budget // ranks.at_once)


def _by_directions(inputs: LinearPolicyLossInputs, head: Head, grads: Gradients, ranks: OneRank) -> Evaluated:
    """The loss of all tokens, and with it the multiples of what chunks of any tokens have made of hidden's gradient."""
    assert grads.hidden is not None
    ids, dtype = torch.where(inputs.active, inputs.ids.squeeze(1), IGNORED), sum_dtype(head.dtype)
    rows = grads.hidden if grads.hidden.dtype == dtype else torch.zeros_like(grads.hidden, dtype=dtype)
    found = directions(head, inputs.hidden, ids, inputs.memory_budget, rows, ranks)
    evaluated = inputs.evaluate(head.ops, found.logp, found.entropy)
    multiples(rows, evaluated.grad_logp, out=rows)
    if rows is not grads.hidden:
        grads.hidden.copy_(rows)
    ranks.add_up(grads.hidden, slice(0, len(ids)))
    return evaluated


def _two_passes(inputs: LinearPolicyLossInputs, head: Head, grads: Gradients | None, ranks: OneRank) -> Evaluated:
    """The loss of all tokens, then the gradients, if any, from logits computed again."""
    hidden, budget = inputs.hidden, inputs.memory_budget
    active = torch.where(inputs.active[:, None], inputs.ids, IGNORED)
    own = ranks.own_ids(active)
    found = token_logprobs.statistics(head, hidden, own, [], budget)
    logp, entropy, *saved = ranks.merged(found, active)
    evaluated = inputs.evaluate(head.ops, logp.squeeze(1), entropy)
    if grads is not None:
        lse, lse_rest, squares, *_ = saved
        upstream = (evaluated.grad_logp[:, None], evaluated.grad_entropy, None, None)
        token_logprobs.gradients(head, upstream, hidden, own, (lse, lse_rest, entropy, squares), budget, grads)
        if grads.hidden is not None:
            ranks.add_up(grads.hidden, slice(0, len(own)))
    return evaluated
