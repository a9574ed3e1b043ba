"""Op position_adaptive_clip: one walk forwards that counts valid tokens."""

import torch
import triton.language as tl
from torch import Tensor

from . import launch
from .scalar import clip, power
from .spans import Spans, fill_outside, parameter, sequence, valid_tokens
from .statistic import positions


@launch.kernel
def clip_kernel(
    cu_seqlens, mask, starts, num_tokens, num_sequences, log_ratio, tensors, clipped_out, inside_out,
    eps_low: tl.float64, eps_high: tl.float64, exponent: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    spans = Spans(cu_seqlens, mask, starts, num_tokens, num_sequences)
    T: tl.constexpr = log_ratio.dtype.element_ty
    i = tl.program_id(0)
    begin, end = sequence(spans, i)
    fill_outside(spans, i, begin, end, clipped_out, BLOCK)
    fill_outside(spans, i, begin, end, inside_out, BLOCK)
    count = tl.zeros((), tl.int32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        valid = valid_tokens(spans, at, at < end)
        t, count = positions(spans, valid, valid, count, T)
        width = power(t, parameter(exponent, tensors[2], at, valid, T))
        low = -parameter(eps_low, tensors[0], at, valid, T) * width
        high = parameter(eps_high, tensors[1], at, valid, T) * width
        x = tl.load(log_ratio + at, mask=valid, other=0.0)
        inside = valid & (x >= low) & (x <= high)
        tl.store(clipped_out + at, tl.where(valid, clip(x, low, high), 0.0), mask=at < end)
        tl.store(inside_out + at, inside.to(T), mask=at < end)


def position_adaptive_clip(
    log_ratio: Tensor, mask: Tensor | None, cu_seqlens: Tensor, params: list[float], param_tensors: list[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """clip(x, -eps_low t^power, eps_high t^power) and where x lies inside (1 or 0); [N] each, zero in masked cells."""
    sequences = cu_seqlens.numel() - 1
    if sequences == 0:
        return torch.zeros_like(log_ratio), torch.zeros_like(log_ratio)
    clipped, inside = torch.empty_like(log_ratio), torch.empty_like(log_ratio)
    spans = Spans(cu_seqlens, mask, None, log_ratio.numel(), sequences)
    block = launch.token_block(spans.num_tokens, sequences)
    with launch.on_device_of(log_ratio):
        clip_kernel[(sequences,)](
            *spans, log_ratio, tuple(param_tensors), clipped, inside, *params, BLOCK=block,
            num_warps=launch.token_warps(block),
        )  # fmt: skip
    return clipped, inside
