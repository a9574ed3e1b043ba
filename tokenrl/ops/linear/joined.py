"""A loss in which sequences meet, the two of a pair, from hidden states, with its gradients, in one pass over chunks.

A chunk holds whatever meets each other whole: so all it does to the loss is known as soon as its log-probs are, and
6 N D V flops make the gradients too, where linear_token_logprobs needs 8 unless all logits fit. Where a row has a
divergence from a reference, the logits of both heads lie side by side, with 2 N D' V flops more. Where what meets
does not fit into a chunk, two passes over chunks cut anywhere take 8 N D V and 4 N D' V.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import pair
from .chunk import Chunk
from .gemm import ProductSum, empty, sum_bytes, sum_dtype
from .head import FEWEST_TOKENS, Head, HeadInputs, Rows, compacted, even, rows_at, split, too_small
from .pair import Pair
from .ranks import OneRank
from .token_logprobs import Gradients

ByToken = tuple[Tensor, Tensor | None]  # the loss's gradients by log-probs and divergences [N]


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


def most_rows(heads: Sequence[Head], budget: int, grads: Gradients, ranks: OneRank, count: int) -> int:
    """How many of so many tokens fit into a chunk of the logits of these heads; 0 where too few do."""
    fit = _fitting(heads, budget, grads, ranks, count)
    return 0 if fit < min(count, FEWEST_TOKENS) else fit


def _fitting(heads: Sequence[Head], budget: int, grads: Gradients, ranks: OneRank, count: int) -> int:
    sums = ranks.summed(sum_bytes(grads.weight, heads[0].dtype))
    return pair.most_rows([ranks.widest(head) for head in heads], count, budget, sums)


def even_chunks(used: Tensor, heads: Sequence[Head], budget: int, grads: Gradients, ranks: OneRank) -> list[Rows]:
    """The tokens of chunks that are cut anywhere, for two passes."""
    index, count = compacted(used)
    fit = _fitting(heads, budget, grads, ranks, count)
    if fit < min(count, 1):
        raise too_small(budget, len(heads) * ranks.widest(heads[0]).vocab)
    return [rows_at(index, at) for at in split(count, even(count, max(fit, 1)))]


def run(
    inputs: HeadInputs, heads: Sequence[Head], other_hidden: Tensor | None, rows: Tensor, chunks: list[Rows],
    ranks: OneRank, evaluate: Callable[[PerToken], ByToken] | None, grads: Gradients,
) -> PerToken:  # fmt: skip
    """Fills grads, of hidden with sums that ranks.finish ends. heads: of the policy and, with other_hidden, of the
    reference. rows: bool [N], where there is a divergence, KL of the reference to the policy. evaluate: from what is
    there by now to the gradients by log-probs and divergences [N], of which those of the chunk's tokens are final;
    None: no gradients are made."""
    head, ids, count = heads[0], inputs.ids.squeeze(1), inputs.ids.shape[0]
    found = PerToken(*(inputs.hidden.new_zeros(count, dtype=sum_dtype(head.dtype)) for _ in range(3)))
    sizes = [at.stop - at.start if isinstance(at, slice) else at.numel() for at in chunks]
    memory = empty(len(heads) * max(sizes, default=0) * head.vocab, inputs.hidden, head.dtype)
    weight_sum = None
    if grads.weight is not None:
        weight_sum = ProductSum(grads.weight, head.dtype, once=len(chunks) == 1, adds=grads.adds)
    for at in chunks:
        if other_hidden is None:
            own = next(ranks.whole(iter([Chunk.of(head, inputs.hidden, ranks.own_ids(ids), at, memory)]), ids))
            found.logp[at] = own.logp
            if evaluate is not None:
                own.backward(evaluate(found)[0], None, weight_sum, grads)
        else:
            both = Pair(heads, (inputs.hidden, other_hidden), ids, at, memory, "forward_kl", [], rows[at], ranks)
            found.logp[at], found.other_logp[at], found.divergence[at] = both.own.logp, both.other.logp, both.value
            if evaluate is not None:
                by_logp, by_value = evaluate(found)
                assert by_value is not None
                both.own.accumulate(both.differentiate(by_value[at], by_logp[at]), weight_sum, grads)
        if grads.hidden is not None:
            ranks.add_up(grads.hidden, at)
    if weight_sum is not None:
        weight_sum.finish()
    return found
