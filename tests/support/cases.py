"""Random batches and the backends that can run them here."""

import functools
import itertools
import os

import pytest
import sim
import torch

import tokenrl
from tokenrl.instruments.parity import close
from tokenrl.objectives.gates import GATES
from tokenrl.objectives.gates.adaptive import Dhpo, DhpoBranch, Hapo
from tokenrl.objectives.gates.bounded import LogBand, PpoClip, PpoNtp, PrimeRl, SppoToken
from tokenrl.objectives.gates.kl import KlK3, KlK3Unbiased
from tokenrl.objectives.gates.weighted import Cispo, Dppo, DppoKl, DppoTv, Rec, Reinforce, Topr
from tokenrl.objectives.metrics import RAW
from tokenrl.objectives.statistics import FLOWS
from tokenrl.ops import backends

CPU = torch.device("cpu")
PAIRS = [(statistic, flow) for statistic, flows in FLOWS.items() for flow in flows]


@functools.cache
def kernel_backends() -> tuple[str, ...]:
    """Every backend but the reference that can run on cpu tensors here, or on the GPU where there is one; of those that
    TOKENRL_TEST_BACKENDS names, where it does."""
    asked = os.environ.get("TOKENRL_TEST_BACKENDS", "").split()
    if not asked or "sim" in asked:
        sim.register()
    able = (n for n, b in backends.BACKENDS.items() if b.namespace and b.why_not(device_of(n)) is None)
    return tuple(n for n in able if not asked or n in asked)


def backends_to_test() -> tuple[str, ...]:
    return ("reference", *kernel_backends())


def device_of(backend: str) -> torch.device:
    """Kernels of the device are tested on the device where there is one."""
    on_gpu = torch.cuda.is_available() and backend in ("cuda", "triton")
    return torch.device("cuda" if on_gpu else "cpu")


def interpreted(backend: str) -> bool:
    """Whether Triton's interpreter runs it: per operation, whatever its size, a millisecond."""
    return backend == "triton" and device_of(backend).type == "cpu"


def thinned(cases, backend, start=0):
    """Triton's interpreter is slow and takes every fourth case, the simulation of CUDA every second: what a case tries
    of the library is the same on each backend, and what the kernels compute is tried by test_product.py."""
    return cases[start::4] if interpreted(backend) else cases[start % 2 :: 2] if backend == "sim" else cases


def on_backends(names, backends=None, start=0):
    """A test's `backend` and `name`; the shares of `thinned` begin at `start`, so that tests take turns."""
    each = [(b, name) for b in backends or backends_to_test() for name in thinned(list(names), b, start)]
    return pytest.mark.parametrize("backend,name", each)


def gates_under_test() -> dict[str, tokenrl.Gate]:
    """Each gate with parameters that make every branch fire on random log ratios."""
    special = {
        "ppo_clip": PpoClip(0.2, 0.28, dual=1.5),
        "ppo_ntp": PpoNtp(0.2, 0.28, dual=1.5, ntp=0.3),
        "dhpo": Dhpo(0.3, 0.2, 0.28, 0.1, 0.15),
        "dhpo_branch": DhpoBranch(0.3, 0.2, 0.28, 0.1, 0.15),
        "hapo": Hapo(0.2, 0.28, dual=1.5, score=0.4, alpha=0.7, beta=0.9),
        "log_band": LogBand(0.1, 0.15, eps_dual=0.3, power=0.5),
        "sppo_token": SppoToken(0.6),
        "prime_rl": PrimeRl(0.02, 0.03, 0.05, kl_tau=0.3),
        "cispo": Cispo(0.8, 1.2),
        "reinforce": Reinforce(tau=0.5),
        "rec": Rec(0.1, 0.15, 0.25, 0.3, keep="ring", weight="clipped-ratio"),
        "topr": Topr(ceiling=0.9),
        "dppo": Dppo(0.03, 0.02, ceiling=1.1, divergence=0.025),
        "dppo_tv": DppoTv(0.03, 0.02, ceiling=1.1),
        "dppo_kl": DppoKl(0.01, 0.02, ceiling=1.1),
        "kl_k3": KlK3(ceiling=0.05),
        "kl_k3_unbiased": KlK3Unbiased(ceiling=0.05),
    }
    return {name: special.get(name) or gate() for name, gate in GATES.items()}


def grid(*shape, sigma, generator):
    """Normal numbers on multiples of 2^-12: the same in fp32 and fp64."""
    return (torch.randn(*shape, dtype=torch.float64, generator=generator) * sigma * 4096).round() / 4096


def batch(seed: int, rows: int = 5, width: int = 19, poison: bool = True) -> dict:
    """A padded batch in fp64 with ragged lengths, holes, a fully masked row, and NaN or inf in masked cells."""
    g = torch.Generator().manual_seed(seed)
    logp = grid(rows, width, sigma=0.5, generator=g) - 1.5
    old_logp = logp - grid(rows, width, sigma=0.3, generator=g)
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    mask = (torch.arange(width) < lengths[:, None]) & (torch.rand(rows, width, generator=g) > 0.15)
    mask[0, :2], mask[0, 2] = True, False
    mask[-1] = False
    if poison:
        logp[~mask], old_logp[~mask] = torch.nan, torch.inf
    advantages = grid(rows, sigma=1.0, generator=g)
    advantages[1] = 0
    return {
        "logp": logp,
        "old_logp": old_logp,
        "advantages": advantages,
        "mask": mask,
        "token_weight": grid(rows, width, sigma=1.0, generator=g).abs(),
        "segment_ids": torch.arange(width).expand(rows, width) // 4 + torch.randint(0, 2, (rows, 1), generator=g),
        "group_ids": torch.tensor([7, -3, 7, -3, 11, 7, 11, 2])[torch.arange(rows) % 8],
    }


def packed(case: dict) -> dict:
    """The same batch packed: the rows' first `lengths` cells one after another (holes stay)."""
    mask = case["mask"]
    width = mask.shape[1]
    lengths = torch.where(mask, torch.arange(1, width + 1), 0).amax(1)
    cells = torch.arange(width) < lengths[:, None]
    out = {k: v[cells] if v.shape == mask.shape else v for k, v in case.items()}
    return out | {"cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])}


# Not these: REAL takes no weights; covariances are those of the batch, and clip_cov draws among them.
WEIGHED = [name for name in tokenrl.OBJECTIVES if name not in ("real", "clip_cov", "kl_cov")]


def run(objective, case: dict, backend: str, dtype: torch.dtype, **more):
    """(loss, gradient, raw metrics) on a backend, the inputs cast to dtype; clip_cov draws alike in each run."""
    torch.manual_seed(0)
    device = device_of(backend)
    given = {k: (v.to(dtype) if v.is_floating_point() else v).to(device) for k, v in case.items()}
    logp = given.pop("logp").clone().requires_grad_()
    old_logp, advantages = given.pop("old_logp"), given.pop("advantages")
    loss, metrics = tokenrl.policy_loss(objective, logp, old_logp, advantages, backend=backend, **given, **more)
    (grad,) = torch.autograd.grad(loss, logp)
    return loss.detach().cpu(), grad.cpu(), metrics.raw.to(dtype).cpu()  # sums of numbers of that precision


def away_from_edges(objective, make, **more) -> dict:
    """The first case of make(seed) on which moving every log-prob by 1e-5 changes no clip decision."""
    for seed in itertools.count():
        case = make(seed)
        decisions = []
        for step in (-1e-5, 1e-5):
            moved = case | {"logp": case["logp"] + step}
            decisions.append(run(objective, moved, "reference", torch.float64, **more)[2][4:7])
        if torch.equal(*decisions):
            return case


def to_rounding(found, expected, what="", least=0.0) -> None:
    """Apart by roundings of the largest entry or of `least`: what a GEMM or a sum does in another order."""
    largest = expected.nan_to_num(posinf=0, neginf=0).abs().max().item() if expected.numel() else 0.0
    apart = 64 * torch.finfo(found.dtype).eps * max(largest, least)
    torch.testing.assert_close(found, expected, rtol=0, atol=apart, equal_nan=True, msg=lambda text: f"{what}: {text}")


def repeats(found, expected, objective: str, backend: str) -> None:
    """Bit by bit what our kernels compute; to rounding what torch sums: the reference, and forms on every backend."""
    if backend == "reference" or tokenrl.objective(objective).form is not None:
        to_rounding(found, expected, objective, least=1.0)
    else:
        assert torch.equal(found, expected), objective


def check(objective, case: dict, backend: str, dtype: torch.dtype, **more) -> None:
    """Loss, gradient and metrics of a backend against the fp64 reference, by the one tolerance rule."""
    truth = run(objective, case, "reference", torch.float64, **more)
    base = run(objective, case, "reference", dtype, **more)
    kernel = run(objective, case, backend, dtype, **more)
    for name, *values in zip(("loss", "gradient", "metrics"), kernel, truth, base, strict=True):
        if name == "metrics":
            for i, entry in enumerate(RAW):
                close(*(v[i] for v in values), what=f"{backend} {entry}")
        else:
            close(*values, what=f"{backend} {name}")
