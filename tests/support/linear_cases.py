"""Random heads, and linear_token_logprobs on a backend against the reference: every value, and every gradient."""

import numpy as np
import torch
from cases import device_of, to_rounding
from logit_cases import DIFFERENTIABLE, EXACT, held, long_logits, long_statistics, on, upstream, weighted

import tokenrl
from tokenrl.logprobs.from_logits import OUTPUTS
from tokenrl.ops.linear.head import BYTES_PER_TILE, FEWEST
from tokenrl.ops.linear.pair import PARTS

# Rounded logits may rank differently from those of the truth: the order is compared where the GEMM is exact.
VALUES = tuple(name for name in OUTPUTS if name not in EXACT)


def make(*shape, width=24, vocab=301, dtype=torch.float32, k=None, seed=0, bias=True):
    """(hidden [*shape, width], weight, bias, ids [*shape] or [*shape, k]); logits of a standard deviation of 2.5."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=g)
    weight = torch.randn(vocab, width, generator=g) * 2.5 / width**0.5
    offsets = torch.randn(vocab, generator=g) * 0.5
    ids = torch.randint(0, vocab, shape if k is None else (*shape, k), generator=g)
    return hidden.to(dtype), weight.to(dtype), offsets.to(dtype) if bias else None, ids


def make_exact(*shape, width=8, vocab=301, dtype=torch.float32, k=None):
    """Small integers: their logits are integers that every dtype holds, with many ties."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randint(-2, 3, (*shape, width), generator=g)
    weight, bias = torch.randint(-1, 2, (vocab, width), generator=g), torch.randint(-1, 2, (vocab,), generator=g)
    ids = torch.randint(0, vocab, shape if k is None else (*shape, k), generator=g)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), ids


def budget_of(weight, rows, columns=FEWEST):
    """A memory_budget for which tiles have so many columns, and at most so many rows where there are more."""
    size, width = weight.dtype.itemsize, weight.shape[1]
    return columns * width * (size + max(size, 4)) + rows * (columns * size + width * size + 256)


def pair_budget(rows, width, vocab, size):
    """A memory_budget for which a chunk of two heads' logits has so many rows. width: the larger one, size: of a
    number."""
    return vocab * size - -rows * (2 * PARTS + 1) * (vocab * size + width * size + BYTES_PER_TILE) // PARTS + 1


def same_bits(one: dict, other: dict, torchs=("hidden", "weight", "bias")) -> None:
    """Bit by bit what we compute; what comes out of torch's GEMMs and sums, which promise no bits, to its rounding."""
    for name, x in one.items():
        if name in torchs:
            to_rounding(x, other[name], name)
        else:
            assert torch.equal(x.nan_to_num(), other[name].nan_to_num()), name


def run(hidden, weight, bias, ids, backend, outputs=VALUES, pulled=DIFFERENTIABLE, rows=None, frozen=(), **options):
    """The outputs by name and the gradients by the name of their tensor, None where a leaf gets none.

    rows: weights of each row's upstream gradients. frozen: tensors that want no gradient."""
    device = device_of(backend)
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    given = {name: x.detach().to(device) for name, x in given.items() if x is not None}
    leaves = {name: x.requires_grad_() for name, x in given.items() if name not in frozen}
    stats = tokenrl.linear_token_logprobs(
        given["hidden"], given["weight"], ids.to(device), bias=given.get("bias"), outputs=outputs, backend=backend,
        **on(device, options),
    )  # fmt: skip
    found = dict(zip(outputs, stats, strict=True))
    pulled = [name for name in outputs if name in pulled]
    if pulled and leaves:
        weights = [weighted(upstream(name, found[name]), rows).to(found[name]) for name in pulled]
        grads = torch.autograd.grad([found[name] for name in pulled], leaves.values(), weights, allow_unused=True)
        found |= dict(zip(leaves, grads, strict=True))
    return {name: x if x is None else x.detach().cpu() for name, x in found.items()}


def references(hidden, weight, bias, ids, compute_dtype=None, **what):
    """(truth, base): computed from the same, already rounded tensors, exactly and in the kernel's precision."""
    base = run(hidden, weight, bias, ids, "reference", compute_dtype=compute_dtype, **what)
    if hidden.dtype == torch.float64:
        return longest(base, hidden, weight, bias, ids, **what), base
    exact = (x if x is None else x.double() for x in (hidden, weight, bias))
    return run(*exact, ids, "reference", **what), base


def check(hidden, weight, bias, ids, backend, memory_budget=None, **options):
    """Values and gradients by the tolerance rule. Returns the kernel's results."""
    truth, base = references(hidden, weight, bias, ids, **options)
    kernel = run(hidden, weight, bias, ids, backend, memory_budget=memory_budget, **options)
    return held(kernel, truth, base, backend)


class Long(np.ndarray):
    """An array where logit_cases.py takes a tensor: torch has no type of this precision."""

    def numpy(self):
        return np.asarray(self)


def longest(base, hidden, weight, bias, ids, pulled=DIFFERENTIABLE, rows=None, row_mask=None, ignore_index=-100, **how):
    """The results in `base` in np.longdouble; nothing in torch is finer than fp64."""
    ids = ids.reshape(hidden.shape[:-1].numel(), -1).numpy()
    used = (ids != ignore_index) & (True if row_mask is None else row_mask.reshape(-1, 1).numpy())
    active = used.any(1, keepdims=True)
    states, columns = hidden.flatten(0, -2).numpy().astype(np.longdouble), weight.numpy().astype(np.longdouble)
    states = np.where(active, states, 0)
    logits = states @ columns.T + (0 if bias is None else bias.numpy())
    z, keep, slope = long_logits(logits.reshape(*hidden.shape[:-1], -1).view(Long), active, **how)
    found, slopes = long_statistics(z, keep, np.where(used, ids, 0), used)
    grad = np.zeros_like(z)
    for name in set(pulled) & set(base) & set(DIFFERENTIABLE):
        g = weighted(upstream(name, base[name]), rows).reshape(len(z), -1, 1).numpy()
        grad += (g * slopes[name]).sum(1)
    found = {name: np.where(active, x, 0) for name, x in found.items()}
    grad = np.where(keep & active, grad * slope, 0)
    found |= {"hidden": grad @ columns, "weight": grad.T @ states, "bias": grad.sum(0)}
    exact = {name: torch.from_numpy(found[name].astype(np.float64)) for name in found if name in base}
    exact = {name: x.view(base[name].shape) for name, x in exact.items()}
    return exact | {name: base[name] for name in EXACT if name in base}
