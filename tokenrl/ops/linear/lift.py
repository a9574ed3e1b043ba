"""fp16 gradients of logits, lifted by a power of two: w p of a token's weight and a probability is 1e-10 in a usual
step, and the smallest fp16 number 6e-8. The sums, in fp32, take the factor out again."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .head import Head, Rows

PRODUCT = 2.0**15  # the largest product of logit gradients with hidden or weight: a CPU rounds these to fp16
WEIGHT = 2.0**8  # above every entry of a head; |sum_v dlogit_v weight_v| is twice as large at most
MOST = 126  # 2^127 times a number below 1 would still be finite in fp32, its inverse not normal


def lifted(
    head: Head, rows: Rows, upstream: Sequence[Tensor | None], states: Tensor
) -> tuple[list[Tensor | None], float]:
    """(upstream gradients of the rows by logp, [n] or [n, K], entropy, lse and log_sum_sq_probs, times 2^k; 2^-k), the
    largest k that keeps every product finite."""
    if head.dtype != torch.float16:
        return list(upstream), 1.0
    by_logp, by_entropy, by_lse, by_squares = upstream
    size = states.new_zeros(states.shape[0], dtype=torch.float32)
    # p (log p + entropy), p^2 / sum p^2 - p: their factors.
    factors = ((by_entropy, math.log(head.vocab) + 1), (by_lse, 1), (by_squares, 4))
    for gradient, factor in ((None if by_logp is None else by_logp.reshape(len(size), -1).abs().sum(1), 1), *factors):
        if gradient is not None:
            size += factor * gradient.abs()
    factor = lift(head, rows, size, states)
    return [g if g is None else g * factor for g in upstream], 1 / factor


def lift(head: Head, rows: Rows, size: Tensor, states: Tensor) -> float:
    """2^k, 1 where the dtype has the range of fp32. size: [n], of each row's gradients by its transformed logits the
    largest, and half the sum of their sizes, at most. One sync on a GPU."""
    if head.dtype != torch.float16 or not states.numel():
        return 1.0
    size = size * abs(head.logit_scale)
    size /= head.temperature if head.temperatures is None else head.temperatures[rows]
    widest = torch.linalg.vector_norm(states, math.inf, dim=1)
    bound = torch.maximum(2 * WEIGHT * size.amax(), (size * widest).sum()).item()
    if not 0 < bound < math.inf:
        return 1.0
    return 2.0 ** min(max(math.floor(math.log2(PRODUCT / bound)), -MOST), MOST)
