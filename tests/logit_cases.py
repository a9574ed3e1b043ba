"""Random logits, and token_logprobs on a backend against the reference: every value, and every gradient."""

import torch
from cases import device_of

import tokenrl
from tokenrl.logprobs import OUTPUTS
from tokenrl.parity import close

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


def other_order(logits, ids, **options):
    """The reference with the vocabulary turned round: how far fp64 is from itself, since nothing here is finer."""
    if (keep := options.get("keep_mask")) is not None:
        options["keep_mask"] = keep.flip(-1)
    ignored = ids == options.get("ignore_index", -100)
    found = run(logits.flip(-1), torch.where(ignored, ids, logits.shape[-1] - 1 - ids), "reference", **options)
    return {name: x.flip(-1) if name == "gradient" else x for name, x in found.items()}


def check(logits, ids, backend, **options):
    """By the tolerance rule; the truth is the reference in fp64 on the same, already rounded logits.

    Returns the kernel's results.
    """
    truth = run(logits.double(), ids, "reference", **options)
    base = (
        run(logits, ids, "reference", **options)
        if logits.dtype != torch.float64
        else other_order(logits, ids, **options)
    )
    kernel = run(logits, ids, backend, **options)
    for name, x in kernel.items():
        if name in EXACT:
            assert torch.equal(x, truth[name]), f"{backend} {name}: {x}, truth {truth[name]}"
        else:
            assert x.dtype == base[name].dtype
            close(x, truth[name], base[name], what=f"{backend} {name}")
    return kernel
