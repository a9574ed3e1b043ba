"""Ops token_logprobs and token_logprobs_backward: log-prob of an id, entropy and log-sum-exp over one row of logits.

One program per row, which it reads once in blocks. Blocks begin at multiples of ALIGN elements of the buffer, not
at the row's own start: where 16 bytes do not divide a row, only its first and last block pay for narrow loads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

ALIGN = tl.constexpr(8)
IGNORED = tl.constexpr(-100)
STAGES = tl.constexpr(3)  # blocks on their way from memory while one is worked on


@triton.jit
def _online(logits, at, keep, inverse_temperature, m, total, weighted, T: tl.constexpr, WHOLE: tl.constexpr):
    """One block into the state: running maximum m, and per lane sum e^(z - m) and sum e^(z - m) (z - m)."""
    raw = tl.load(logits + at) if WHOLE else tl.load(logits + at, mask=keep, other=-float("inf"))
    z = raw.to(T) * inverse_temperature
    highest = tl.maximum(m, tl.max(z, 0))
    # Until a finite logit is seen the maximum is -inf, and 0 stands in for it: e^-inf = 0.
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    moved = tl.where(m == -float("inf"), 0.0, m - shift)
    scale = tl.exp(moved)
    weighted = (weighted + moved * total) * scale
    e = tl.exp(z - shift)
    total = total * scale + e
    weighted += e * tl.maximum(z - shift, -1e4)  # finite, so that 0 * -inf is 0
    return highest, total, weighted


@triton.jit
def forward_kernel(
    logits, ids, logp_out, entropy_out, lse_out, time, vocab, stride_batch, stride_time,
    inverse_temperature: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = logp_out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + row)
    if id == IGNORED:
        tl.store(logp_out + row, tl.zeros((), T))
        tl.store(entropy_out + row, tl.zeros((), T))
        tl.store(lse_out + row, tl.zeros((), T))
    else:
        begin = (row // time) * stride_batch + (row % time) * stride_time
        end = begin + vocab
        inverse = tl.full((), inverse_temperature, T)
        lanes = tl.arange(0, BLOCK)
        m, total, weighted = tl.full((), -float("inf"), T), tl.zeros((BLOCK,), T), tl.zeros((BLOCK,), T)
        first = begin // ALIGN * ALIGN
        at = first + lanes
        m, total, weighted = _online(logits, at, (at >= begin) & (at < end), inverse, m, total, weighted, T, False)
        whole = first + BLOCK * tl.maximum((end - first) // BLOCK, 1)
        for block in tl.range(first + BLOCK, whole, BLOCK, num_stages=STAGES):
            m, total, weighted = _online(logits, block + lanes, None, inverse, m, total, weighted, T, True)
        if whole < end:
            at = whole + lanes
            m, total, weighted = _online(logits, at, at < end, inverse, m, total, weighted, T, False)
        known = (id >= 0) & (id < vocab)
        z = tl.load(logits + begin + id, mask=known, other=float("nan")).to(T) * inverse
        mass = tl.sum(total, 0)
        log_mass = tl.log(mass)
        tl.store(logp_out + row, (z - m) - log_mass)
        tl.store(entropy_out + row, log_mass - tl.sum(weighted, 0) / mass)
        tl.store(lse_out + row, m + log_mass)


@triton.jit
def _gradient(
    logits, grad, at, to, keep, id_at, inverse, lse, entropy, g_logp, g_entropy, T: tl.constexpr, WHOLE: tl.constexpr
):
    """Gradient of one block of logits read `at`, written `to`."""
    raw = tl.load(logits + at) if WHOLE else tl.load(logits + at, mask=keep, other=-float("inf"))
    z = raw.to(T) * inverse
    log_p = z - lse
    p = tl.exp(log_p)
    g = tl.where(at == id_at, g_logp, 0.0) - g_logp * p
    if g_entropy is not None:
        g -= tl.where(p == 0.0, 0.0, g_entropy * p * (log_p + entropy))
    value = (g * inverse).to(grad.dtype.element_ty)
    if WHOLE:
        tl.store(grad + to, value)
    else:
        tl.store(grad + to, value, mask=keep)


@triton.jit
def _row_scalar(values, row, T: tl.constexpr):
    if values is None:
        return tl.zeros((), T)
    else:
        return tl.load(values + row)


@triton.jit
def _zeros(grad, begin, end, lanes, BLOCK: tl.constexpr):
    for block in range(begin, end, BLOCK):
        to = block + lanes
        tl.store(grad + to, tl.zeros((BLOCK,), grad.dtype.element_ty), mask=to < end)


@triton.jit
def backward_kernel(
    grad_logp, grad_entropy, logits, ids, lse_in, entropy_in, grad, time, vocab, stride_batch, stride_time,
    inverse_temperature: tl.float64, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = lse_in.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + row)
    begin, lanes = row * vocab, tl.arange(0, BLOCK)
    end = begin + vocab
    g_logp, g_entropy = _row_scalar(grad_logp, row, T), _row_scalar(grad_entropy, row, T)
    if (id == IGNORED) | ((g_logp == 0.0) & (g_entropy == 0.0)):
        _zeros(grad, begin, end, lanes, BLOCK)
    else:
        lse, entropy = tl.load(lse_in + row), tl.load(entropy_in + row)
        inverse = tl.full((), inverse_temperature, T)
        # Blocks are aligned in the output; `lag` leads to the same logit in a padded or sliced input.
        lag = tl.zeros((), tl.int64)
        if not PACKED:
            lag = (row // time) * stride_batch + (row % time) * stride_time - begin
        id_at = begin + lag + id
        slope = g_entropy if grad_entropy is not None else None
        first = begin // ALIGN * ALIGN
        to = first + lanes
        _gradient(
            logits, grad, to + lag, to, (to >= begin) & (to < end), id_at, inverse, lse, entropy, g_logp, slope, T,
            False,
        )  # fmt: skip
        whole = first + BLOCK * tl.maximum((end - first) // BLOCK, 1)
        for block in tl.range(first + BLOCK, whole, BLOCK, num_stages=STAGES):
            to = block + lanes
            _gradient(logits, grad, to + lag, to, None, id_at, inverse, lse, entropy, g_logp, slope, T, True)
        if whole < end:
            to = whole + lanes
            _gradient(logits, grad, to + lag, to, to < end, id_at, inverse, lse, entropy, g_logp, slope, T, False)


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse) [B, T] of ids under softmax(logits / temperature), in fp32 (fp64 for fp64 logits)."""
    batch, time, vocab = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logp, entropy, lse = (ids.new_empty((batch, time), dtype=dtype) for _ in range(3))
    if ids.numel():
        block = launch.vocab_block(vocab, logits.dtype)
        with launch.on_device_of(logits):
            forward_kernel[(batch * time,)](
                logits, ids, logp, entropy, lse, time, vocab, logits.stride(0), logits.stride(1), 1 / temperature,
                BLOCK=block, num_warps=launch.vocab_warps(block),
            )  # fmt: skip
    return logp, entropy, lse


def token_logprobs_backward(
    grad_logp: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, ids: Tensor, lse: Tensor, entropy: Tensor,
    temperature: float,
) -> Tensor:  # fmt: skip
    """Gradient with respect to logits, contiguous [B, T, V] in their dtype; rows without a gradient are not read."""
    batch, time, vocab = logits.shape
    grad = torch.empty((batch, time, vocab), dtype=logits.dtype, device=logits.device)
    if grad.numel():
        block = launch.vocab_block(vocab, logits.dtype)
        with launch.on_device_of(logits):
            backward_kernel[(batch * time,)](
                grad_logp, grad_entropy, logits, ids, lse, entropy, grad, time, vocab, logits.stride(0),
                logits.stride(1), 1 / temperature, PACKED=logits.is_contiguous(), BLOCK=block,
                num_warps=launch.vocab_warps(block),
            )  # fmt: skip
    return grad
