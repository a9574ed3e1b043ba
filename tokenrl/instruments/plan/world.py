"""A loss head on tp x cp x dp ranks: what each part takes and sends, and where more ranks of a vocabulary stop paying.

Ranks of a tensor-parallel group are side by side, those of a context-parallel group tp apart, of a data-parallel one
tp cp apart. A rank has tokens / cp of a micro-batch and vocab / tp rows of the head.
"""

from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from .model import Machine, Shape, Way
from .network import Collective, all_gather
from .ways import GATHERED, SUM, ways

GEMMS, KERNELS, CONTEXT = "GEMMs", "statistics, gradients, sums", "log-probs of the context"
GATHERED_TOKENS = 2 * SUM  # bytes of a token that context ranks gather: its log-prob and entropy
WALK_LAUNCHES = 6  # beside the kernel that walks a batch's sequences
SEQUENCE, METRICS = 24, 13 * 8  # bytes of a sequence in global_weights, and of the metrics
MOST_RANKS, PAYS = 1024, 0.75  # of the time before, at most, with twice the ranks: half of what is ideal
WEIGHT_IN, WEIGHT_OUT = 2, 4  # bytes of a number of the weight that is gathered, and of its gradient that is summed


@dataclass(frozen=True)
class World:
    """Ranks of each kind of group. sequences: of a rank's optimizer step."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    sequences: int = 16

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.dp

    def shape(self, batch: Shape) -> Shape:
        """A rank's, of a micro-batch's."""
        return replace(batch, tokens=-(-batch.tokens // self.cp), shards=self.tp)


@cache
def way_of(shape: Shape, world: World, device: str, budget: int | None) -> Way:
    """What a trainer calls: linear_policy_loss, in one pass if it can; beside context= from log-probs."""
    found = {way.name: way for way in ways(shape, device, budget)}
    names = ["linear_policy_loss", "linear_policy_loss, 2 passes"] if world.cp == 1 else ["linear_token_logprobs"]
    return next(found[name] for name in names if name in found)


def parts(batch: Shape, world: World, machine: Machine, budget: int | None = None) -> list[dict[str, Any]]:
    """Seconds of each part, as it takes them alone, and the collective in it; once a micro-batch, or once a step."""
    way = way_of(world.shape(batch), world, machine.device, budget)
    gemms = [step for step in way.both if step.gemm]
    kernels = [step for step in way.both if not step.gemm]
    found = [
        _part(GEMMS, sum(map(machine.computed, gemms))),
        _part(KERNELS, sum(map(machine.computed, kernels))),
    ]
    found += [_part(step.name, machine.sent(step), step.sent) for step in way.both if step.sent]
    if world.cp > 1:
        sent = context_gather(batch.tokens, world.cp, world.tp)
        found.append(_part(CONTEXT, context_seconds(batch.tokens, machine, sent), sent))
    if world.dp > 1:
        for name, one in data_collectives(world).items():
            found.append(_part(name, machine.network.seconds(one), one, once="step"))
    return found


def _part(name: str, seconds: float, sent: Collective | None = None, once: str = "micro-batch") -> dict[str, Any]:
    return {"part": name, "seconds": seconds, "once a": once, **(sent._asdict() if sent else {})}


def context_gather(tokens: int, cp: int, tp: int = 1, token_bytes: int = GATHERED_TOKENS) -> Collective:
    """Of the tokens' numbers, from each rank its own."""
    return all_gather(cp, token_bytes * tokens / cp, stride=tp)


def context_seconds(tokens: int, machine: Machine, sent: Collective) -> float:
    """Of the gather, and of the loss of the whole batch on every rank: of one sequence, the slowest to walk."""
    return machine.network.seconds(sent) + tokens * machine.walk + WALK_LAUNCHES * machine.launch


def data_collectives(world: World) -> dict[str, Collective]:
    """Of global_weights, the counts and then the sequences; of the metrics."""
    stride = world.tp * world.cp
    return {
        "global_weights": all_gather(world.dp, 8 + SEQUENCE * world.sequences, 2, stride),
        "metrics": all_gather(world.dp, METRICS, 1, stride),
    }


def head_seconds(shape: Shape, machine: Machine, budget: int | None = None) -> float:
    """Of one micro-batch, with what overlaps."""
    return machine.times(way_of(shape, World(shape.shards), machine.device, budget))[1]


def pays_up_to(batch: Shape, machine: Machine, budget: int | None = None, most: int = MOST_RANKS) -> int:
    """Ranks of the vocabulary up to which each doubling takes at least a quarter off a micro-batch's time."""
    ranks, before = 1, head_seconds(replace(batch, shards=1), machine, budget)
    while 2 * ranks <= min(most, batch.vocab):
        now = head_seconds(replace(batch, shards=2 * ranks), machine, budget)
        if now > PAYS * before:
            break
        ranks, before = 2 * ranks, now
    return ranks


def most_ranks(vocab: int, flops: float, bandwidth: float, sum_bytes: int = SUM) -> float:
    """3 V B / (b F): where the sum of hidden's gradient takes as long as the GEMMs, whatever tokens and width are."""
    return 3 * vocab * bandwidth / (sum_bytes * flops)


def gathered_weight(shape: Shape) -> tuple[float, float]:
    """(bytes that a rank sends to gather the weight for a micro-batch and to sum its gradient; tokens of a micro-batch
    from which on that is less than the vocabulary-parallel head sends)."""
    share = (shape.shards - 1) / shape.shards
    each = 2 * shape.hidden * SUM * share + GATHERED * (shape.shards - 1)  # of a token: hidden's gradient, statistics
    whole = (WEIGHT_IN + WEIGHT_OUT) * shape.vocab * shape.hidden * share
    return whole, whole / each if each else 0.0


def described(batch: Shape, world: World, machine: Machine, budget: int | None = None) -> dict[str, Any]:
    """All of it, as JSON has it."""
    shape = world.shape(batch)
    way = way_of(shape, world, machine.device, budget)
    found = parts(batch, world, machine, budget)
    beside = sum(part["seconds"] for part in found if part["part"] == CONTEXT)
    whole, tokens = gathered_weight(shape)
    return {
        "tp": world.tp, "cp": world.cp, "dp": world.dp, "ranks": world.ranks, "sequences": world.sequences,
        "tokens": shape.tokens, "rows": shape.columns, "network": asdict(machine.network),
        "way": way.name, "chunks": way.chunks, "parts": found, "seconds": machine.times(way)[1] + beside,
        "input_bytes": shape.inputs, "peak_bytes": way.peaks[1],
        "pays_up_to": pays_up_to(replace(shape, shards=1), machine, budget),
        "most_ranks_in_node": most_ranks(shape.vocab, machine.gemms["logits"], machine.network.link),
        "most_ranks_between": most_ranks(shape.vocab, machine.gemms["logits"], machine.network.network),
        "head_bytes": sum(step.sent.bytes for step in way.both if step.sent), "gathered_weight_bytes": whole,
        "gathered_weight_from_tokens": tokens,
    }  # fmt: skip
