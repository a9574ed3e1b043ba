"""The ways to compute a loss head: the steps of each, and what it holds, as the ops cut their tiles and chunks."""

from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ...logprobs.from_hidden import DEFAULT_BUDGET
from ...ops.linear.gemm import CPU_ROWS
from ...ops.linear.head import BYTES_PER_TILE, Head, Tiles, even, fitting_whole_rows, tiles_of, whole_rows_of
from ...ops.linear.head import FEWEST_TOKENS as FEWEST
from ...ops.linear.kept import gradient_sums, logits_fit
from ...ops.linear.policy_loss import WORTH_CUTTING, WORTH_EXCHANGING, rows_of_chunk
from ..machine_limits import Work
from ..work import gradient_of_logits, statistics_of_logits
from .model import Shape, Step, Way, gemm, kernel
from .network import all_gather, all_reduce

SUM = 4  # bytes of a number in fp32: sums, log-probs, and what eager computes a softmax in
EAGER_LOSS, OUR_LOSS = 1000, 200  # bytes of a token's loss, eager and ours: some 80 and 17 small ops
PER_TILE, PER_CHUNK = 8, 24  # launches of one more: GEMMs, statistics, gradients, sums; the objective
GATHERED = 16  # bytes of a row's statistics that vocabulary shards exchange
EXCHANGE, HIDDEN_SUM = "exchange of statistics", "sum of hidden's gradient"


def _exchange(shape: Shape, collectives: int = 1) -> Iterator[Step]:
    """What shards tell each other of each row, in one all-gather or several."""
    if shape.shards > 1:
        sent = all_gather(shape.shards, shape.tokens * GATHERED, collectives)
        yield Step(EXCHANGE, Work(0, 0, 0), launches=collectives, sent=sent)


def _megatrons_exchange(shape: Shape) -> Iterator[Step]:
    """Three all-reduces of a number a row: maxima, sums, logits of the ids."""
    if shape.shards > 1:
        yield Step(EXCHANGE, Work(0, 0, 0), launches=3, sent=all_reduce(shape.shards, 3 * SUM * shape.tokens, 3))


def _shared_hidden(shape: Shape, collectives: int = 1) -> Iterator[Step]:
    """The sum of the shards' gradients of hidden, in fp32, each in its ring."""
    if shape.shards > 1:
        work = Work(shape.states * SUM, shape.states * SUM, 0)
        yield Step(HIDDEN_SUM, work, sent=all_reduce(shape.shards, shape.states * SUM, collectives))


def _statistics(shape: Shape, launches: int = 0) -> Step:
    return Step("statistics", statistics_of_logits(shape.logits, shape.size), launches=launches)


def _gradient(shape: Shape, launches: int = 0) -> Step:
    return Step("gradient", gradient_of_logits(shape.logits, shape.size), launches=launches)


def _loss(shape: Shape, of_a_token: int) -> Step:
    moved = shape.tokens * of_a_token
    return kernel("loss of the log-probs", moved // 2, moved // 2)


def eager(shape: Shape) -> Way:
    """All logits, an fp32 copy of them, log_softmax, gather: as trainers write it."""
    cells, size = shape.logits, shape.size
    copied = size < SUM
    copies = [kernel("fp32 copy", cells * size, cells * SUM)] * copied
    casts = [kernel("gradient in 16 bits", cells * SUM, cells * size)] * copied
    gradients = (shape.weight + shape.states) * size
    return Way(
        "eager",
        (
            gemm(shape, "logits"), *copies, kernel("log_softmax", cells * SUM, cells * SUM, cells),
            *_megatrons_exchange(shape), _loss(shape, EAGER_LOSS // 2),
        ),
        (
            kernel("gather's gradient", 0, cells * SUM),
            kernel("log_softmax's gradient", 2 * cells * SUM, cells * SUM, cells), *casts,
            gemm(shape, "hidden"), gemm(shape, "weight"), *_shared_hidden(shape),
            _loss(shape, EAGER_LOSS // 2),
        ),
        (cells * (size + SUM + SUM * copied), max(cells * 3 * SUM, cells * size + gradients)),
    )  # fmt: skip


def from_logits(shape: Shape) -> Way:
    """All logits; token_logprobs, whose gradient is as large as they are."""
    cells = shape.logits * shape.size
    return Way(
        "token_logprobs",
        (
            gemm(shape, "logits"), _statistics(shape),
            *_exchange(shape), _loss(shape, OUR_LOSS),
        ),
        (
            _gradient(shape), gemm(shape, "hidden"), gemm(shape, "weight"),
            *_shared_hidden(shape),
        ),
        (cells, max(2 * cells, cells + (shape.weight + shape.states) * shape.size)),
    )  # fmt: skip


def _head(shape: Shape, device: str) -> Head:
    with FakeTensorMode():
        weight = torch.empty(shape.columns, shape.hidden, dtype=shape.dtype, device=device)
    return Head(None, weight, None, 1.0, None, 0.0, 1.0, None, shape.dtype)


def _count(total: int, size: int) -> int:
    return -(-total // max(size, 1))


def _tiled(
    shape: Shape, device: str, budget: int, kept: bool = False
) -> tuple[list[Step], list[Step], tuple[int, int]]:
    """Statistics of all tokens and, from logits that were kept or are computed again, their gradients; what both hold
    beside results."""
    head, size = _head(shape, device), shape.size
    held_logits = shape.logits * size * kept
    whole = fitting_whole_rows(head, budget) >= min(shape.tokens, FEWEST)
    first = (whole_rows_of if whole else tiles_of)(head, shape.tokens, budget)
    second = tiles_of(head, shape.tokens, budget - held_logits, sums=gradient_sums(head, shape.tokens))
    across, down = _count(shape.columns, second.columns), _count(shape.tokens, second.rows)
    # A product of hidden's gradient is added to its sum once a tile across, one of the weight's once a tile down.
    added = kernel("sums of hidden's gradient", shape.states * SUM * across, shape.states * SUM * across)
    if down > 1:
        added = added._replace(work=_plus(added.work, shape.weight * SUM * down))
    forward = [
        gemm(shape, "logits"),
        _statistics(shape, PER_TILE * (_tiles(shape, first) - 1)),
    ]
    tiles = across * down
    logits = kernel("copy of the logits", held_logits, held_logits) if kept else gemm(shape, "logits")
    backward = [
        logits, _gradient(shape, PER_TILE * (tiles - 1)),
        gemm(shape, "hidden"), gemm(shape, "weight"), added, *_shared_hidden(shape),
    ]  # fmt: skip
    statistics = shape.tokens * BYTES_PER_TILE * _count(shape.columns, first.columns)
    # On a CPU a 16-bit product is rounded, in memory of its own, before it is added.
    rounded = device == "cpu" and size < SUM
    product = min(CPU_ROWS, second.columns if down > 1 else shape.tokens) * shape.hidden * size * rounded
    summed = second.columns * shape.hidden * SUM * (down > 1 and size < SUM)
    held = second.cells * size + shape.states * SUM + product + summed
    return forward, backward, (first.cells * size + statistics, held_logits + held)


def _tiles(shape: Shape, tiles: Tiles) -> int:
    return _count(shape.tokens, tiles.rows) * _count(shape.columns, tiles.columns)


def _plus(work: Work, more: int) -> Work:
    return Work(work.read + more, work.written + more, work.exponentials)


def from_hidden(shape: Shape, device: str, budget: int) -> Way:
    """linear_token_logprobs: tiles of logits, computed once more in the backward unless all fit and are kept."""
    kept = logits_fit(_head(shape, device), shape.tokens, budget)
    forward, backward, held = _tiled(shape, device, budget, kept)
    results = (shape.weight + shape.states) * shape.size
    steps = (*forward, *_exchange(shape), _loss(shape, OUR_LOSS))
    return Way("linear_token_logprobs", steps, tuple(backward), (held[0], max(held[0], held[1] + results)))


def _waiting(shape: Shape, device: str) -> tuple[int, int, Step]:
    """Bytes of the gradients that wait for the upstream one (of fp16 in fp32); with their products by it; that step."""
    size = SUM if shape.dtype == torch.float16 else shape.size
    numbers = shape.weight + shape.states
    step = kernel("times the upstream gradient", numbers * size, numbers * shape.size)
    product = 0 if size == shape.size else numbers * shape.size  # of one dtype in its own place
    if device == "cpu" and size != shape.size:  # some rows at a time: multiplied, and copied
        product += min(CPU_ROWS, shape.columns) * shape.hidden * SUM
        step = step._replace(work=_plus(step.work, numbers * SUM))
    return numbers * size, numbers * size + product, step


def _sums(shape: Shape) -> int:
    """Bytes of the fp32 sums that several chunks take for the weight's gradient; fp16 and fp32 sum in its own place."""
    return shape.weight * SUM if shape.dtype == torch.bfloat16 else 0


def _chunk(shape: Shape, device: str, budget: int) -> int:
    """Tokens of a chunk of linear_policy_loss, 0 where too few fit."""
    head, at_once = _head(shape, device), 1 if shape.shards == 1 else 2
    fits = rows_of_chunk(head, shape.tokens, budget // at_once, _sums(shape) if at_once == 1 else 0)
    if at_once > 1:  # as on ranks: one is exchanged while the next is made
        worth = min(fits, max(_count(shape.tokens, WORTH_CUTTING), WORTH_EXCHANGING))
        alone = rows_of_chunk(head, shape.tokens, budget, 0)
        fits = worth or (alone if alone >= shape.tokens else 0)
    return even(shape.tokens, fits) if fits else 0


def one_pass(shape: Shape, device: str, rows: int) -> Way:
    """linear_policy_loss in one pass over chunks of so many tokens."""
    sums, chunks = _sums(shape), _count(shape.tokens, rows)
    waiting, last, scaled = _waiting(shape, device)
    summed = [kernel("sums of the weight's gradient", shape.weight * SUM * chunks, shape.weight * SUM * chunks)]
    forward = (
        gemm(shape, "logits"), _statistics(shape),
        *_exchange(shape, chunks), _loss(shape, OUR_LOSS),
        _gradient(shape, PER_CHUNK * (chunks - 1)),
        gemm(shape, "hidden"), gemm(shape, "weight"), *summed * (chunks > 1),
        *_shared_hidden(shape, chunks),
    )  # fmt: skip
    at_once = 1 if shape.shards == 1 else min(2, chunks)
    shares = (
        shape.states * (SUM - shape.size) * (shape.shards > 1)
    )  # of hidden's gradient, rounded when they are summed
    peak = at_once * rows * shape.columns * shape.size + waiting + shares + sums * (chunks > 1)
    return Way("linear_policy_loss", forward, (scaled,), (peak, max(peak, last)), chunks)


def two_passes(shape: Shape, device: str, budget: int) -> Way:
    """linear_policy_loss where a coefficient depends on tokens of later chunks, or hardly any row fits into one."""
    forward, backward, held = _tiled(shape, device, budget)
    waiting, last, scaled = _waiting(shape, device)
    steps = (*forward, *_exchange(shape), _loss(shape, OUR_LOSS), *backward)
    peak = max(held[0], held[1] + waiting)
    return Way("linear_policy_loss, 2 passes", steps, (scaled,), (peak, max(peak, last)))


def ways(shape: Shape, device: str, budget: int | None = None) -> list[Way]:
    """Each way that there is to compute a loss and its gradients from hidden states, on "cpu" or "cuda".

    A row with a form costs what linear_token_logprobs does; where one chunk holds all tokens, no other takes
    linear_policy_loss two passes."""
    budget = DEFAULT_BUDGET[device] if budget is None else budget
    found = [eager(shape), from_logits(shape), from_hidden(shape, device, budget)]
    rows = _chunk(shape, device, budget)
    if rows > 0:
        found.append(one_pass(shape, device, rows))
    if rows < shape.tokens:
        found.append(two_passes(shape, device, budget))
    return found
