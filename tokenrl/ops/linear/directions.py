"""Of a frozen head: the gradient of each token's log-prob by its hidden state, before any coefficient is known,

    dL/dh_t = coef_t u_t,   u_t = sum_v dlogp_t/dz_tv W_v,

so that chunks of any tokens make log-probs and u_t side by side: 4 N D V flops, where logits that are computed again
take 6. The entropy's gradient is no multiple of u_t: its own GEMM would cost what these do.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernel_ops import IGNORED
from .gemm import sum_dtype
from .head import FEWEST_TOKENS, Head, compacted, fitting_whole_rows, rows_at, split, whole_rows_of
from .ranks import ONE, OneRank, chunks_of
from .token_logprobs import Gradients


class Found(NamedTuple):
    """[N] each, 0 of tokens whose id is ignored."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    lse_rest: Tensor


def has_directions(head: Head, count: int, budget: int) -> bool:
    """Whether whole rows fit, as where token_logprobs.statistics has them."""
    return fitting_whole_rows(head, budget) >= min(count, FEWEST_TOKENS)


def directions(head: Head, hidden: Tensor, ids: Tensor, budget: int, out: Tensor, ranks: OneRank = ONE) -> Found:
    """Statistics of the ids [N]; fills out, zeros [N, D] in sum_dtype, with u, of each rank its share."""
    found = Found(*(hidden.new_zeros(ids.shape[0], dtype=sum_dtype(head.dtype)) for _ in Found._fields))
    index, count = compacted(ids != IGNORED)
    size = whole_rows_of(ranks.widest(head), count, budget // ranks.at_once).rows
    for chunk in chunks_of(head, hidden, ids, [rows_at(index, at) for at in split(count, size)], ranks):
        for of_all, of_chunk in zip(found, (chunk.logp, chunk.entropy, chunk.lse, chunk.lse_rest), strict=True):
            of_all[chunk.rows] = of_chunk
        chunk.backward(torch.ones_like(found.logp), None, None, Gradients(out, None, None))
    return found
