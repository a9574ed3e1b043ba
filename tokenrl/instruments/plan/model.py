"""What a loss head costs: time and memory of each way to compute it, from a model of bytes, flops and launches.

N tokens, hidden states of D, a vocabulary of V (a shard: V / k), b bytes a number. A step is a GEMM or a kernel; it
takes the larger of what its flops, its bytes and its exponentials take, and something for its launches. What ranks
send each other is beside it, and behind it where chunks let it wait.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..machine_limits import Limits, Work
from .network import Collective, Network

# What a way costs the host on tensors of a few numbers, in additions of such: forward, and forward and backward.
HOST = {
    "eager": (50, 140), "token_logprobs": (100, 170), "linear_token_logprobs": (165, 300),
    "linear_policy_loss": (280, 375), "linear_policy_loss, 2 passes": (280, 375),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Of a head. shards: of the vocabulary, each on a GPU of its own; what follows is of one of them."""

    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    shards: int = 1

    @property
    def columns(self) -> int:
        return -(-self.vocab // self.shards)

    @property
    def logits(self) -> int:
        return self.tokens * self.columns

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    @property
    def weight(self) -> int:
        """Numbers of the weight, as of its gradient."""
        return self.columns * self.hidden

    @property
    def states(self) -> int:
        return self.tokens * self.hidden

    @property
    def inputs(self) -> int:
        """Bytes of hidden and weight."""
        return (self.weight + self.states) * self.size


class Step(NamedTuple):
    """gemm: which of the three it is, "logits", "hidden" or "weight", or "". launches: beside those of HOST.
    sent: to other shards."""

    name: str
    work: Work
    flops: int = 0
    gemm: str = ""
    launches: int = 0
    sent: Collective | None = None


@dataclass(frozen=True)
class Way:
    """forward, backward: its steps. peaks: bytes beyond the inputs, of the forward and of both. chunks: of the forward,
    which sends what it has of one while it computes the next."""

    name: str
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    peaks: tuple[int, int]
    chunks: int = 1

    @property
    def both(self) -> tuple[Step, ...]:
        return self.forward + self.backward

    @property
    def launches(self) -> tuple[int, int]:
        """Of forward and of both, in small operations of the host."""
        forward, both = HOST[self.name]
        return forward + sum(s.launches for s in self.forward), both + sum(s.launches for s in self.both)


@dataclass(frozen=True)
class Machine:
    """limits, gemms: bytes and exponentials per second, and flops of each of the three GEMMs. launch: seconds of the
    host's small operation. memory: bytes, None: unknown. network: to other ranks. walk: seconds a token of a kernel
    along one sequence."""

    name: str
    device: str
    limits: Limits
    gemms: Mapping[str, float]
    launch: float
    memory: float | None
    network: Network
    source: str
    walk: float = 1e-6 / 1024

    def computed(self, step: Step) -> float:
        """Seconds: the larger of what a step's flops, bytes and exponentials take."""
        flops = step.flops / self.gemms[step.gemm] if step.gemm else 0.0
        return max(flops, self.limits.least(step.work)[0])

    def sent(self, step: Step) -> float:
        """Seconds on the way to other ranks."""
        return 0.0 if step.sent is None else self.network.seconds(step.sent)

    def seconds(self, step: Step) -> float:
        return self.computed(step) + self.sent(step)

    def in_turn(self, steps: tuple[Step, ...], chunks: int) -> float:
        """Steps one after the other, but for what is sent of a chunk while the next is computed: all of it but the
        last chunk's, or, where the network is the slower, all that is computed but the first's."""
        computed, sent = sum(map(self.computed, steps)), list(filter(None, map(self.sent, steps)))
        first, rest = sum(sent[:1]), sum(sent[1:])
        return max(computed + (first + rest) / chunks, (computed + first) / chunks + rest)

    def times(self, way: Way) -> tuple[float, float]:
        """Seconds of forward and of both. A GPU works while the host launches, a CPU is the host."""
        first = self.in_turn(way.forward, way.chunks)
        work = [first, first + self.in_turn(way.backward, 1)]
        host = [count * self.launch for count in way.launches]
        together = max if self.device == "cuda" else float.__add__
        forward, both = map(together, work, host)
        return forward, both


def gemm(shape: Shape, name: str) -> Step:
    """One of the three: each reads two of hidden states, weight and logits, and writes the third."""
    sizes = {"logits": shape.logits, "hidden": shape.states, "weight": shape.weight}
    written = sizes[name] * shape.size
    flops = 2 * shape.tokens * shape.hidden * shape.columns
    return Step(f"GEMM: {name}", Work(sum(sizes.values()) * shape.size - written, written, 0), flops, name)


def kernel(name: str, read: int, written: int, exponentials: int = 0) -> Step:
    return Step(name, Work(read, written, exponentials))
