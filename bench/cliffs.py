"""What an option, an objective or an awkward batch costs beside its plain neighbour: a ratio of processor times of one
thread, the two taking turns in one process."""

from collections.abc import Callable
from dataclasses import dataclass
from time import thread_time
from typing import Any

import torch
from torch import Tensor

import tokenrl

TURNS = 9  # of each pair; of both the fastest counts
VOCAB, ROWS = 32000, 64
AIM = 1.5


@dataclass(frozen=True)
class Cliff:
    """work: how much more there is to do than for the neighbour."""

    name: str
    call: Callable[[], object]
    neighbour: str
    plain: Callable[[], object]
    aim: float = AIM
    work: float = 1.0


def _made(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _logprobs(logits: Tensor, backward: bool, **options: Any) -> Callable[[], object]:
    ids = torch.zeros(ROWS, dtype=torch.int64)
    leaf = logits.detach().requires_grad_(backward)

    def call() -> object:
        logp = tokenrl.token_logprobs(leaf, ids, **options).logp
        return torch.autograd.grad(logp.sum(), leaf) if backward else logp

    return call


def _vocabulary() -> list[Cliff]:
    logits = 3 * _made(ROWS, VOCAB)
    cut, keep = torch.where(_made(ROWS, VOCAB) > 0, logits, -torch.inf), _made(VOCAB) < 1.28
    cut[:, 0], keep[0] = 1, True
    found = []
    for backward in (False, True):
        way = "forward + backward" if backward else "forward"
        for name, x, options, aim in (
            ("softcap", logits, {"softcap": 30.0}, 2 * AIM), ("half of the logits -inf", cut, {}, AIM),
            ("keep_mask without a tenth", logits, {"keep_mask": keep}, AIM),
            ("temperature 0.05", logits, {"temperature": 0.05}, AIM),
        ):  # fmt: skip
            plain = _logprobs(logits, backward)
            found.append(
                Cliff(f"{name}, {way}", _logprobs(x, backward, **options), f"token_logprobs {way}", plain, aim)
            )
    return found


def _objective(name: str, rows: int, width: int) -> Callable[[], object]:
    old, advantages, groups = _made(rows, width), _made(rows), torch.arange(rows) // 8
    logp = (old + 0.1 * _made(rows, width)).requires_grad_()
    options = {"group_ids": groups} if name == "real" else {}
    return lambda: torch.autograd.grad(tokenrl.policy_loss(name, logp, old, advantages, **options)[0], logp)


def _objectives() -> list[Cliff]:
    plain = _objective("hapo", 256, 1024)
    found = [Cliff(name, _objective(name, 256, 1024), "hapo", plain) for name in ("ppo", "dapo", "rmt", "dhpo")]
    few, many = _objective("real", 1024, 4), _objective("real", 8192, 4)
    return [*found, Cliff("real, 8192 rollouts, a row", many, "of 1024", few, work=8)]


def _tempo(rows: int, ids: Tensor) -> Callable[[], object]:
    return lambda: tokenrl.advantages.tempo(_made(rows), torch.zeros(rows, dtype=torch.int64), ids)


def _trees() -> list[Cliff]:
    chain, random = torch.ones(512, 1000).tril(-1).long(), _made(512, 1000).long()
    return [Cliff("tempo, 512 rows that leave one by one", _tempo(512, chain), "random ids", _tempo(512, random))]


def _seconds(call: Callable[[], object]) -> float:
    begin = thread_time()
    call()
    return thread_time() - begin


def ratio(cliff: Cliff) -> float:
    _seconds(cliff.call), _seconds(cliff.plain)
    turns = [(_seconds(cliff.call), _seconds(cliff.plain)) for _ in range(TURNS)]
    slow, plain = (min(times) for times in zip(*turns, strict=True))
    return slow / plain / cliff.work


def measure() -> list[dict[str, Any]]:
    """A row of the table each: name, neighbour, ratio, aim."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = [
        {"name": cliff.name, "neighbour": cliff.neighbour, "ratio": ratio(cliff), "aim": cliff.aim}
        for cliff in (*_vocabulary(), *_objectives(), *_trees())
    ]
    torch.set_num_threads(threads)
    return found
