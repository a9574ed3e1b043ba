"""What a gate's function computes of single tokens, without an objective around it: for tokenrl parity --gate."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..objectives.gates import MAX_PARAMS
from . import launch

BLOCK = 4096 if launch.INTERPRETED else 128  # the interpreter pays per operation, not per element


@launch.kernel
def gate_kernel(
    s, x, logp, advantages, t, out, n, p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64, p4: tl.float64,
    p5: tl.float64, GATE: tl.constexpr, NUM_PARAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = s.dtype.element_ty
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = at < n
    zero = tl.zeros((BLOCK,), T)
    params = (
        tl.full((BLOCK,), p0, T), tl.full((BLOCK,), p1, T), tl.full((BLOCK,), p2, T), tl.full((BLOCK,), p3, T),
        tl.full((BLOCK,), p4, T), tl.full((BLOCK,), p5, T),
    )  # fmt: skip
    value, d_s, d_logp, low, high, dual = GATE(
        tl.load(s + at, mask=known, other=0.0), tl.load(x + at, mask=known, other=0.0),
        tl.load(logp + at, mask=known, other=0.0), tl.load(advantages + at, mask=known, other=0.0),
        tl.load(t + at, mask=known, other=1.0), *params[:NUM_PARAMS],
    )  # fmt: skip
    tl.store(out + at, zero + value, mask=known)
    tl.store(out + n + at, zero + d_s, mask=known)
    tl.store(out + 2 * n + at, zero + d_logp, mask=known)
    tl.store(out + 3 * n + at, tl.where(low, 1.0, zero), mask=known)
    tl.store(out + 4 * n + at, tl.where(high, 1.0, zero), mask=known)
    tl.store(out + 5 * n + at, tl.where(dual, 1.0, zero), mask=known)


def gate_values(
    gate: Callable, s: Tensor, x: Tensor, logp: Tensor, advantages: Tensor, t: Tensor, params: list[float]
) -> Tensor:
    """[6, N] of a gate's function: value, d_s, d_logp, and the three bounds as 0 and 1."""
    out = torch.empty(6, s.numel(), dtype=s.dtype, device=s.device)
    numbers = [*params, *[0.0] * (MAX_PARAMS - len(params))]
    with launch.on_device_of(s):
        gate_kernel[(triton.cdiv(s.numel(), BLOCK),)](
            s, x, logp, advantages, t, out, s.numel(), *numbers, GATE=gate, NUM_PARAMS=len(params), BLOCK=BLOCK
        )
    return out
