"""What ranks send each other, and what it takes: a latency, which grows with the nodes, and bytes over a bandwidth."""

import math
from dataclasses import dataclass
from typing import NamedTuple


class Collective(NamedTuple):
    """Of so many ranks, each the stride-th of the world. bytes: that a rank sends, in all; times: in how many calls."""

    kind: str
    ranks: int
    bytes: float
    times: int = 1
    stride: int = 1


def all_gather(ranks: int, own: float, times: int = 1, stride: int = 1) -> Collective:
    """own: bytes that each rank hands in, in all."""
    return Collective("all_gather", ranks, own * (ranks - 1), times, stride)


def all_reduce(ranks: int, own: float, times: int = 1, stride: int = 1) -> Collective:
    """A ring: everything goes round twice, but for a rank's own part."""
    return Collective("all_reduce", ranks, 2 * own * (ranks - 1) / ranks, times, stride)


@dataclass(frozen=True)
class Network:
    """node: ranks of one. link, network: bytes/s that a rank sends to others of its node, and of other nodes. latency,
    network_latency: seconds of a small collective in a node, and of one over two. doubling_latency: more of an
    all-reduce, a tree, each time the nodes double; node_latency: more of an all-gather, a ring, for each further node.

    Source: NCCL's own estimates, NVLink of an H100 and a 400 Gb/s network, as they are reached.
    """

    node: int = 8
    link: float = 350e9
    network: float = 45e9
    latency: float = 20e-6
    network_latency: float = 40e-6
    doubling_latency: float = 6e-6
    node_latency: float = 3e-6

    def nodes(self, sent: Collective) -> int:
        """That a group of ranks spans."""
        together = max(int(self.node) // sent.stride, 1)
        return -(-sent.ranks // together)

    def bandwidth(self, sent: Collective) -> float:
        return self.link if self.nodes(sent) == 1 else self.network

    def alpha(self, sent: Collective) -> float:
        """Seconds of one call without bytes."""
        nodes = self.nodes(sent)
        if nodes == 1:
            return self.latency
        if sent.kind == "all_reduce":
            return self.network_latency + self.doubling_latency * math.log2(nodes)
        return self.network_latency + self.node_latency * (nodes - 1)

    def seconds(self, sent: Collective) -> float:
        return sent.times * self.alpha(sent) + sent.bytes / self.bandwidth(sent) if sent.ranks > 1 else 0.0


FREE = Network(link=math.inf, network=math.inf, latency=0, network_latency=0, doubling_latency=0, node_latency=0)
