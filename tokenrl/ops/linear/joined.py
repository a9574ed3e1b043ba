"""A loss in which sequences meet, the two of a pair, from hidden states, with its gradients, in one pass over chunks.

A chunk holds whatever meets each other whole: so all it does to the loss is known as soon as its log-probs are, and
6 N D V flops make the gradients too, where linear_token_logprobs needs 8 unless all logits fit. Where a row has a
divergence from a reference, the logits of both heads lie side by side, with 2 N D' V flops more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import divergence
from .chunk import Chunk
from .gemm import ProductSum, empty, sum_dtype
from .head import Head, HeadInputs, Rows, compacted, rows_at
from .policy_loss import rows_of_chunk, sum_bytes
from .token_logprobs import Gradients


@dataclass(frozen=True)
class PerToken:
    """What the chunks fill, [N], 0 where no token was read; the last two only where there is a divergence."""

    logp: Tensor
    other_logp: Tensor
    divergence: Tensor


def chunks_of(
    used: Tensor, rows: Tensor, parts: Callable[[], Sequence[int]], most: Callable[[int], int]
) -> list[Rows] | None:
    """The tokens of each chunk; None where there are none, or the tokens of some part do not fit into one.

    used: bool [N], the tokens. rows: int64 [N], the sequence of each. parts: a number for each sequence, the same for
    those that meet. most: of so many tokens, how many fit into a chunk."""
    index, count = compacted(used)
    fit = most(count)
    if count <= fit:
        return [rows_at(index, slice(0, count))] if count else None
    numbers = parts()
    tokens = torch.zeros(len(numbers), dtype=torch.int64, device=used.device).index_add_(0, rows, used.long()).tolist()
    sizes: dict[int, int] = {}
    for part, size in zip(numbers, tokens, strict=True):
        sizes[part] = sizes.get(part, 0) + size
    if max(sizes.values()) > fit:
        return None
    filled, chunk = [0], {}
    for part, size in sizes.items():
        if filled[-1] + size > fit:
            filled.append(0)
        filled[-1] += size
        chunk[part] = len(filled) - 1
    of_sequence = torch.tensor([chunk[part] for part in numbers], device=used.device)
    index = used.nonzero().squeeze(1)
    return list(index[of_sequence[rows[index]].argsort(stable=True)].split(filled))


def most_rows(heads: Sequence[Head], budget: int, grads: Gradients, count: int) -> int:
    """How many of so many tokens fit into a chunk of the logits of these heads; 0 where too few do."""
    share = budget if len(heads) == 1 else budget // divergence.TILES
    return min(rows_of_chunk(head, count, share, sum_bytes(grads.weight, head.dtype)) for head in heads)


def run(
    inputs: HeadInputs, heads: Sequence[Head], other_hidden: Tensor | None, rows: Tensor, chunks: list[Rows],
    evaluate: Callable[[PerToken], tuple[Tensor, Tensor | None]], grads: Gradients,
) -> None:  # fmt: skip
    """Fills grads. heads: of the policy and, with other_hidden, of the reference. rows: bool [N], where there is a
    divergence, KL of the reference to the policy. evaluate: from what is there by now to the gradients by log-probs and
    divergences [N], of which those of the chunk's tokens are final."""
    head, ids, count = heads[0], inputs.ids.squeeze(1), inputs.ids.shape[0]
    found = PerToken(*(inputs.hidden.new_zeros(count, dtype=sum_dtype(head.dtype)) for _ in range(3)))
    sizes = [at.stop - at.start if isinstance(at, slice) else at.numel() for at in chunks]
    memory = [empty(max(sizes) * head.vocab, inputs.hidden, head.dtype) for _ in heads]
    weight_sum = None
    if grads.weight is not None:
        weight_sum = ProductSum(grads.weight, head.dtype, once=len(chunks) == 1, adds=grads.adds)
    for at in chunks:
        own = Chunk(head, inputs.hidden, ids, at, memory[0])
        found.logp[at] = own.logp
        if other_hidden is None:
            own.backward(evaluate(found)[0], None, weight_sum, grads)
        else:
            beside = Chunk(heads[1], other_hidden, ids, at, memory[1])
            _backward_of_both(own, beside, rows[at], found, evaluate)
            own.accumulate(1.0, weight_sum, grads)
    if weight_sum is not None:
        weight_sum.finish()


def _backward_of_both(
    own: Chunk, beside: Chunk, rows: Tensor, found: PerToken,
    evaluate: Callable[[PerToken], tuple[Tensor, Tensor | None]],
) -> None:  # fmt: skip
    """Turns the policy's logits into their gradient."""
    ops, at = own.head.ops, own.rows
    given = (rows, *own.transform(), *beside.transform(), "forward_kl", [])  # DivergenceInputs
    value, by_p, _, statistics = ops.divergence(own.logits, beside.logits, None, *given)
    found.divergence[at], found.other_logp[at] = value, beside.logp
    by_logp, by_value = evaluate(found)
    assert by_value is not None
    of_divergence = ops.divergence_backward(by_value[at], own.logits, beside.logits, by_p, "logits", statistics, *given)
    ops.token_logprobs_backward_(
        by_logp[at], None, None, None, own.logits, own.ids, own.lse, own.lse_rest, own.entropy, own.lse.new_empty(0),
        *own.transform(),
    )  # fmt: skip
    own.logits.add_(of_divergence)
