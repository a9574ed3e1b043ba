"""A student's loss step from hidden states and both heads, forward and backward: PyTorch, TRL's chunked divergence and
Liger's fused one, as they run on this machine, and tokenrl's, in one process and in turns, in one thread's processor
time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tokenrl
from tokenrl.instruments import machine_limits

from .competitors import why_not
from .measure import peak_memory

TURNS = 2  # of each way; the fastest counts
# (tokens, width, vocabulary, dtype)
CASES = ((512, 256, 151936, torch.bfloat16), (1024, 512, 50257, torch.float32))
BETAS = {"kd": 0.0, "gkd": 0.5}  # of TRL's and Liger's JSD, whose end 0 is D(r || p)
Heads = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden, weight, other_hidden, other_weight
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of gradients, relative to PyTorch's in the same dtype


def heads(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> Heads:
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(rows, width, generator=g) for rows in (tokens, vocab, tokens, vocab)]
    made[1::2] = [weight * width**-0.5 for weight in made[1::2]]
    hidden, weight, *other = (x.to(dtype) for x in made)
    return hidden.requires_grad_(), weight.requires_grad_(), other[0], other[1]


def eager(of: Heads, beta: float) -> Tensor:
    hidden, weight, other_hidden, other_weight = of
    log_p, log_r = ((x @ w.t()).float().log_softmax(-1) for x, w in ((hidden, weight), (other_hidden, other_weight)))
    if beta == 0:
        return torch.nn.functional.kl_div(log_p, log_r, reduction="none", log_target=True).sum() / len(hidden)
    log_m = torch.logaddexp(log_p + torch.tensor(1 - beta).log(), log_r + torch.tensor(beta).log())
    kl = [torch.nn.functional.kl_div(log_m, x, reduction="none", log_target=True).sum(-1) for x in (log_r, log_p)]
    return (beta * kl[0] + (1 - beta) * kl[1]).mean()


def trl(of: Heads, beta: float) -> Tensor:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden, weight, other_hidden, other_weight = of
    everyone = torch.ones(1, len(hidden), dtype=torch.int64)
    return _chunked_divergence_loss(hidden[None], other_hidden[None], weight, other_weight, everyone, beta)[0]


def liger(of: Heads, beta: float) -> Tensor:
    """Without its torch.compile, whose graph of a chunk takes a minute to make on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    hidden, weight, other_hidden, other_weight = of
    ids = torch.zeros(len(hidden), dtype=torch.int64)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    return loss(hidden, weight, other_hidden, other_weight, ids)


def ours(of: Heads, row: str) -> Tensor:
    return tokenrl.linear_distillation_loss(row, *(x[None] if k % 2 == 0 else x for k, x in enumerate(of)))[0]


def ways(of: Heads, row: str) -> dict[str, Callable[[], Tensor]]:
    """Name -> the loss; of rivals those that are here."""
    beta, found = BETAS[row], {"eager": lambda: eager(of, BETAS[row])}
    if why_not("trl", "1.16.0", "trl.trainer.distillation_trainer", "_chunked_divergence_loss") is None:
        found["TRL"] = lambda: trl(of, beta)
    if why_not("liger-kernel", "0.8.5", "liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss") is None:
        found["Liger"] = lambda: liger(of, beta)
    return found | {"tokenrl": lambda: ours(of, row)}


def bare_gemms(of: Heads) -> Callable[[], object]:
    """Both heads' logits, and the gradients of hidden and weight."""
    hidden, weight, other_hidden, other_weight = (x.detach() for x in of)

    def call() -> object:
        torch.mm(other_hidden, other_weight.t())
        logits = torch.mm(hidden, weight.t())
        return torch.mm(logits, weight), torch.mm(logits.t(), hidden)

    return call


def check(name: str, found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    """RuntimeError where a way has other gradients than PyTorch: no time of it is shown."""
    for got, wanted in zip(found, right, strict=True):
        error = (got.float() - wanted.float()).norm() / wanted.float().norm()
        if not error < TOLERANCE[wanted.dtype]:
            raise RuntimeError(f"{name}: a gradient is {error:.1e} from that of PyTorch")


def measure() -> list[dict[str, Any]]:
    """A row of the table each: what, seconds and peak bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = [row for case in CASES for name in BETAS for row in _rows(case, name)]
    torch.set_num_threads(threads)
    return found


def _rows(case: tuple[int, int, int, torch.dtype], name: str) -> list[dict[str, Any]]:
    of = heads(*case)
    made = ways(of, name)
    calls: dict[str, Callable[[], Any]] = {
        way: lambda loss=loss: torch.autograd.grad(loss(), of[:2]) for way, loss in made.items()
    }
    right = calls["eager"]()
    for way, call in calls.items():
        check(way, call(), right)  # and each has run once
    calls["bare GEMMs"] = bare_gemms(of)
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(TURNS):
        for way, call in calls.items():
            times[way].append(machine_limits.seconds(call, "cpu", machine_limits.clock("cpu")))
    what = f"{name} {list(case[:3])} {str(case[3])[6:]}"
    return [
        {"what": what, "way": way, "seconds": min(times[way]), "bytes": peak_memory(call, "cpu")}
        for way, call in calls.items()
    ]
