"""The links of all losses, in one program: what csrc/preference.h says step by step, in blocks."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch


class LinkInputs(NamedTuple):
    """scores: [7, S], as score_kernel leaves them. memory: [4, M], the two scores of a link and the
    gradient in them; orders: int64 [2, M], in which they meet, None where in none."""

    pairs: Tensor | None
    desirable: Tensor | None
    base: Tensor | None
    pair_weight: Tensor | None
    normalizer: Tensor | None
    nll_normalizer: Tensor | None
    scores: Tensor
    memory: Tensor
    orders: Tensor | None
    slopes: Tensor
    rewards: Tensor
    accuracy: Tensor
    loss: Tensor
    num_sequences: int
    num_losses: int


@triton.jit
def entry(given, which: tl.constexpr, i, known):
    """Of sequences i: 0 score, 1 slope, 2 divergence, 3 reference, 4 reward, 5 nll, 6 tokens of the nll term."""
    return tl.load(given.scores + which * given.num_sequences + i, mask=known, other=float("nan"))


@triton.jit
def sides_of(given, m, inside):
    """The chosen and the rejected sequence, and whether there are two of these numbers: on a GPU nobody has looked."""
    if given.pairs is None:
        chosen, rejected = m.to(tl.int64), (given.num_losses + m).to(tl.int64)
    else:
        chosen = tl.load(given.pairs + 2 * m, mask=inside, other=-1)
        rejected = tl.load(given.pairs + 2 * m + 1, mask=inside, other=-1)
    known = (tl.minimum(chosen, rejected) >= 0) & (tl.maximum(chosen, rejected) < given.num_sequences)
    return chosen, rejected, inside & known


@triton.jit
def mean_score(given, TILE: tl.constexpr):
    sums = tl.zeros((TILE,), tl.float64)
    for first in range(0, given.num_sequences, TILE):
        i = first + tl.arange(0, TILE)
        sums += tl.where(i < given.num_sequences, entry(given, 0, i, i < given.num_sequences), 0.0)
    return tl.sum(sums, 0) / tl.maximum(given.num_sequences, 1)


@triton.jit
def take_scores(given, beta, base, COUPLING: tl.constexpr, TILE: tl.constexpr):
    """Step 1: the scores that are to meet, and the metrics. Returns how many margins are above 0."""
    n, nan = given.num_losses, float("nan")
    successes = tl.zeros((TILE,), tl.int64)
    for first in range(0, n, TILE):
        m = first + tl.arange(0, TILE)
        inside = m < n
        if COUPLING == "labels":
            score, own = entry(given, 0, m, inside), entry(given, 4, m, inside)
            desirable = tl.load(given.desirable + m, mask=inside, other=0) != 0
            reward, other = tl.where(desirable, own, nan), tl.where(desirable, nan, own)
            margin = tl.where(desirable, own - beta * base, beta * base - own)
            chosen, rejected = score, score * 0 + base
        else:
            won, lost, known = sides_of(given, m, inside)
            reward, other = entry(given, 4, won, known), entry(given, 4, lost, known)
            margin = reward - other
            chosen = entry(given, 0, won, known) + entry(given, 2, won, known)
            rejected = entry(given, 0, lost, known) + entry(given, 2, lost, known)
            if COUPLING == "sorted_margins":
                ref_won, ref_lost = entry(given, 3, won, known), entry(given, 3, lost, known)
                chosen = chosen + ref_won - rejected - ref_lost
                rejected = ref_won - ref_lost
        successes += (inside & (margin > 0)).to(tl.int64)
        tl.store(given.memory + m, chosen, mask=inside)
        tl.store(given.memory + n + m, rejected, mask=inside)
        tl.store(given.rewards + m, reward, mask=inside)
        tl.store(given.rewards + n + m, other, mask=inside)
        tl.store(given.rewards + 2 * n + m, margin, mask=inside)
    return tl.sum(successes, 0)


@triton.jit
def sort(x, n, order, TILE: tl.constexpr):
    """order: which of x is the k-th from below; NaN comes last, and what is equal as it stands."""
    for first in range(0, n, TILE):
        i = first + tl.arange(0, TILE)
        own = tl.load(x + i, mask=i < n, other=0.0)[:, None]
        rank = tl.zeros((TILE,), tl.int64)
        for other in range(0, n, TILE):
            j = other + tl.arange(0, TILE)
            theirs = tl.load(x + j, mask=j < n, other=0.0)[None, :]
            own_nan, their_nan = own != own, theirs != theirs
            earlier = j[None, :] < i[:, None]
            before = (theirs < own) | ((theirs == own) & earlier)
            before = before | (own_nan & ((their_nan == 0) | earlier))
            rank += tl.sum((before & (j < n)[None, :]).to(tl.int64), 1)
        tl.store(order + rank, i, mask=i < n)


@triton.jit
def link_scores(given, normalizer, params, LINK: tl.constexpr, NUM_PARAMS: tl.constexpr, TILE: tl.constexpr):
    """Step 2: the sum of the losses before it is divided, and the gradient in the scores that meet."""
    n = given.num_losses
    losses = tl.zeros((TILE,), tl.float64)
    for first in range(0, n, TILE):
        k = first + tl.arange(0, TILE)
        inside = k < n
        i, j = k.to(tl.int64), k.to(tl.int64)
        if given.orders is not None:
            i = tl.load(given.orders + k, mask=inside, other=0)
            j = tl.load(given.orders + n + k, mask=inside, other=0)
        desirable = inside
        if given.desirable is not None:
            desirable = tl.load(given.desirable + k, mask=inside, other=0) != 0
        chosen = tl.load(given.memory + i, mask=inside, other=-1.0)
        rejected = tl.load(given.memory + n + j, mask=inside, other=-1.0)
        if NUM_PARAMS == 1:
            value, by_chosen, by_rejected = LINK(chosen, rejected, desirable, params[0])
        elif NUM_PARAMS == 2:
            value, by_chosen, by_rejected = LINK(chosen, rejected, desirable, params[0], params[1])
        elif NUM_PARAMS == 3:
            value, by_chosen, by_rejected = LINK(chosen, rejected, desirable, params[0], params[1], params[2])
        else:
            value, by_chosen, by_rejected = LINK(
                chosen, rejected, desirable, params[0], params[1], params[2], params[3]
            )
        if given.pair_weight is not None:
            weight = tl.load(given.pair_weight + k, mask=inside, other=0.0)
            value, by_chosen, by_rejected = weight * value, weight * by_chosen, weight * by_rejected
        losses += tl.where(inside, value, 0.0)
        tl.store(given.memory + 2 * n + i, by_chosen / normalizer, mask=inside)
        tl.store(given.memory + 3 * n + j, by_rejected / normalizer, mask=inside)
    return tl.sum(losses, 0)


@triton.jit
def by_side(given, m, inside, COUPLING: tl.constexpr):
    """The gradient in the chosen and in the rejected sequence of losses m."""
    n = given.num_losses
    by_chosen = tl.load(given.memory + 2 * n + m, mask=inside, other=0.0)
    if COUPLING == "sorted_margins":
        return by_chosen, -by_chosen
    else:
        return by_chosen, tl.load(given.memory + 3 * n + m, mask=inside, other=0.0)


@triton.jit
def sequence_shares(given, s, inside, COUPLING: tl.constexpr, TILE: tl.constexpr):
    """Of sequences s: the gradient in them where they are chosen, where they are rejected, and whether some loss
    chooses them."""
    n = given.num_losses
    if COUPLING == "labels":
        won, _ = by_side(given, s, inside, COUPLING)
        return won, won * 0, tl.load(given.desirable + s, mask=inside, other=0) != 0
    elif given.pairs is None:
        m = tl.where(s < n, s, s - n)
        won, lost = by_side(given, m, inside & (m < n), COUPLING)
        return tl.where(s < n, won, 0.0), tl.where(s < n, 0.0, lost), s < n
    else:
        of_chosen, of_rejected = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.float64)
        times = tl.zeros((TILE,), tl.int32)
        for m in range(0, n):
            won, lost = by_side(given, m, m < n, COUPLING)
            is_chosen, is_rejected = tl.load(given.pairs + 2 * m) == s, tl.load(given.pairs + 2 * m + 1) == s
            of_chosen += tl.where(is_chosen, won, 0.0)
            of_rejected += tl.where(is_rejected, lost, 0.0)
            times += is_chosen.to(tl.int32)
        return of_chosen, of_rejected, times > 0


@triton.jit
def write_slopes(
    given, divergence, COUPLING: tl.constexpr, REJECTED_ALONE: tl.constexpr, NLL: tl.constexpr,
    NLL_OF_ALL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Step 3: of each sequence, with 1 for what takes part in the nll term; that term's sum and tokens."""
    count = given.num_sequences
    sums, tokens = tl.zeros((TILE,), tl.float64), tl.zeros((TILE,), tl.float64)
    for first in range(0, count, TILE):
        s = first + tl.arange(0, TILE)
        inside = s < count
        won, lost, chosen = sequence_shares(given, s, inside, COUPLING, TILE)
        tl.store(given.slopes + s, (won + lost) * entry(given, 1, s, inside), mask=inside)
        of_divergence = divergence * (lost if REJECTED_ALONE else won + lost)
        if COUPLING == "labels":
            of_divergence = won * 0
        tl.store(given.slopes + count + s, of_divergence, mask=inside)
        pays = inside & (chosen | NLL_OF_ALL)
        if NLL:
            sums += tl.where(pays, entry(given, 5, s, inside), 0.0)
            tokens += tl.where(pays, entry(given, 6, s, inside), 0.0)
        tl.store(given.slopes + 2 * count + s, pays.to(tl.float64), mask=inside)
    return tl.sum(sums, 0), tl.sum(tokens, 0)


@triton.jit
def or_else(number, own):
    """What is given, a 0-d tensor, or the call's own number."""
    if number is None:
        return own
    else:
        return tl.load(number)


@launch.kernel
def link_kernel(
    tensors, num_sequences, num_losses, beta: tl.float64, divergence: tl.float64, nll: tl.float64, p0: tl.float64,
    p1: tl.float64, p2: tl.float64, p3: tl.float64, LINK: tl.constexpr, NUM_PARAMS: tl.constexpr,
    COUPLING: tl.constexpr, REJECTED_ALONE: tl.constexpr, NLL: tl.constexpr, NLL_OF_ALL: tl.constexpr,
    TILE: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """tensors: those of LinkInputs, in order."""
    given = LinkInputs(*tensors, num_sequences, num_losses)
    n, count = given.num_losses, given.num_sequences
    base = tl.zeros((), tl.float64)
    if COUPLING == "labels":
        base = mean_score(given, TILE) if given.base is None else tl.load(given.base)
    least = tl.maximum(n, 1).to(tl.float64)
    normalizer = or_else(given.normalizer, least)
    successes = take_scores(given, beta, base, COUPLING, TILE)
    tl.store(given.accuracy, successes.to(tl.float64) / least)
    tl.debug_barrier()  # what one thread has stored another reads, here and below
    if given.orders is not None:
        sort(given.memory, n, given.orders, SORTED)
        sort(given.memory + n, n, given.orders + n, SORTED)
        tl.debug_barrier()
    params = (
        tl.full((), p0, tl.float64), tl.full((), p1, tl.float64), tl.full((), p2, tl.float64),
        tl.full((), p3, tl.float64),
    )  # fmt: skip
    loss = link_scores(given, normalizer, params, LINK, NUM_PARAMS, TILE) / normalizer
    tl.debug_barrier()
    sums, tokens = write_slopes(given, divergence, COUPLING, REJECTED_ALONE, NLL, NLL_OF_ALL, TILE)
    tl.debug_barrier()
    per_token = nll / or_else(given.nll_normalizer, tl.maximum(tokens, 1.0))
    for first in range(0, count, TILE):
        s = first + tl.arange(0, TILE)
        at = given.slopes + 2 * count + s
        pays = tl.load(at, mask=s < count, other=0.0) != 0
        tl.store(at, tl.where(pays, -per_token, 0.0), mask=s < count)
    if NLL:
        loss -= per_token * sums
    tl.store(given.loss, loss.to(given.loss.dtype.element_ty))
