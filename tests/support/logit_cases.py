"""Random logits, and token_logprobs on a backend against the reference: every value, and every gradient."""

import numpy as np
import torch
from cases import device_of

import tokenrl
from tokenrl.instruments.parity import close
from tokenrl.logprobs.from_logits import OUTPUTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DIFFERENTIABLE = ("logp", "entropy", "lse", "log_sum_sq_probs")
EXACT = ("is_top1", "rank")


def make(*shape, dtype=torch.float32, k=None, seed=0, scale=3.0):
    """(logits of a shape [..., V], ids [...] or [..., k]); a sixteenth apart, so that there are ties."""
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(*shape, generator=g) * scale * 16).round() / 16
    rows = shape[:-1] if k is None else (*shape[:-1], k)
    return logits.to(dtype), torch.randint(0, shape[-1], rows, generator=g)


def upstream(name, like):
    """Upstream gradients of an output, the same for every backend and dtype."""
    g = torch.Generator().manual_seed(DIFFERENTIABLE.index(name))
    return torch.randn(like.shape, generator=g, dtype=torch.float64)


def weighted(grad, weight):
    """grad [...] or [..., K] times a weight per row."""
    return grad if weight is None else grad * weight.view(*weight.shape, *(1,) * (grad.dim() - weight.dim()))


def on(device, options):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def run(logits, ids, backend, outputs=OUTPUTS, pulled=DIFFERENTIABLE, weight=None, **options):
    """The outputs by name and, where one of `pulled` is among them, the gradient; weight: of each row's upstream."""
    device = device_of(backend)
    leaf = logits.detach().to(device).requires_grad_()
    stats = tokenrl.token_logprobs(leaf, ids.to(device), outputs=outputs, backend=backend, **on(device, options))
    found = dict(zip(outputs, stats, strict=True))
    pulled = [name for name in outputs if name in pulled]
    if pulled:
        weights = [weighted(upstream(name, found[name]), weight).to(found[name]) for name in pulled]
        (found["gradient"],) = torch.autograd.grad([found[name] for name in pulled], leaf, weights)
    return {name: x.detach().cpu() for name, x in found.items()}


def check(logits, ids, backend, **options):
    """By the tolerance rule; the truth is the reference in fp64 on the same, already rounded logits.

    For fp64 logits nothing in torch is finer: there the truth comes from numpy's longest double. Returns the kernel's
    results.
    """
    base = run(logits, ids, "reference", **options)
    if logits.dtype == torch.float64:
        truth = longest(base, logits, ids, **options)
    else:
        truth = run(logits.double(), ids, "reference", **options)
    kernel = run(logits, ids, backend, **options)
    return held(kernel, truth, base, backend)


def held(kernel, truth, base, backend):
    """The kernel's results by name, each held to the tolerance rule, or to equality where it is no float."""
    for name, x in kernel.items():
        if name in EXACT:
            assert torch.equal(x, truth[name]), f"{backend} {name}: {x}, truth {truth[name]}"
        else:
            assert x.dtype == base[name].dtype
            close(x, truth[name], base[name], what=f"{backend} {name}")
    return kernel


def longest(base, logits, ids, pulled=DIFFERENTIABLE, weight=None, row_mask=None, ignore_index=-100, **options):
    """The results in `base`, term by term as the docstring of token_logprobs gives them, in np.longdouble."""
    ids = ids.reshape(logits.shape[:-1].numel(), -1).numpy()
    used = (ids != ignore_index) & (True if row_mask is None else row_mask.reshape(-1, 1).numpy())
    z, keep, slope = long_logits(logits, used.any(1, keepdims=True), **options)
    found, slopes = long_statistics(z, keep, np.where(used, ids, 0), used)
    grad = np.zeros_like(z)
    for name in set(pulled) & set(base) & set(DIFFERENTIABLE):
        g = weighted(upstream(name, base[name]), weight).reshape(len(z), -1, 1).numpy()
        grad += (g * slopes[name]).sum(1)
    found["gradient"] = np.where(keep, grad * slope, 0)
    rows = used.any(1, keepdims=True)
    exact = {name: np.where(rows, value, 0).astype(np.float64) for name, value in found.items() if name in base}
    exact = {name: torch.from_numpy(value).view(base[name].shape) for name, value in exact.items()}
    return exact | {name: base[name] for name in EXACT if name in base}


def long_logits(logits, rows, outputs=None, temperature=1.0, softcap=None, logit_scale=1.0, keep_mask=None):
    """(z with -inf where it is not kept, what is kept, dz/dlogits); rows that are not used get logits of 0."""
    x = np.where(rows, logits.reshape(-1, logits.shape[-1]).numpy().astype(np.longdouble), 0)
    keep = True if keep_mask is None else keep_mask.expand(logits.shape).reshape(x.shape).numpy()
    keep = np.broadcast_to(~rows | keep, x.shape)
    temperature = np.asarray(temperature, dtype=np.longdouble).reshape(-1, 1)
    z, slope = x * logit_scale, logit_scale / temperature
    if softcap is not None:
        bent = np.tanh(z / softcap)
        z, slope = np.where(x == -np.inf, x, softcap * bent), (1 - bent * bent) * slope
    return np.where(keep, z / temperature, -np.inf), keep, slope


def long_statistics(z, keep, ids, used):
    """(outputs, d output / d z [rows, ids or 1, V])."""
    largest = z.max(1, keepdims=True)
    log_mass = np.log(np.exp(z - largest).sum(1, keepdims=True))
    log_p = z - largest - log_mass
    p = np.exp(log_p)
    finite = np.where(p > 0, log_p, 0)
    entropy, squares = -(p * finite).sum(1, keepdims=True), (p * p).sum(1, keepdims=True)
    found = {
        "logp": np.where(used, np.take_along_axis(log_p, ids, 1), 0),
        "entropy": entropy,
        "lse": largest + log_mass,
        "log_sum_sq_probs": np.log(squares),
        "mean_logit": np.where(keep, z, 0).sum(1, keepdims=True) / keep.sum(1, keepdims=True),
        "max_prob": p.max(1, keepdims=True),
    }
    slopes = {
        "logp": used[:, :, None] * ((ids[:, :, None] == np.arange(z.shape[1])) - p[:, None]),
        "entropy": -(p * (finite + entropy))[:, None],
        "lse": p[:, None],
        "log_sum_sq_probs": 2 * (p * p / squares - p)[:, None],
    }
    return found, slopes
