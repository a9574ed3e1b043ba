"""Every gate x statistic x flow x backend, on padded and packed batches with holes, segments and weights."""

import pytest
import torch
from cases import (
    PAIRS,
    away_from_edges,
    batch,
    check,
    gates_under_test,
    interpreted,
    kernel_backends,
    on_backends,
    packed,
    run,
)

import tokenrl
from tokenrl.instruments.parity import close
from tokenrl.objectives.aggregations import AGGREGATIONS
from tokenrl.objectives.gates.bounded import LogBand, PpoClip

GATES = gates_under_test()


def made(gate, statistic, flow, **more):
    row = tokenrl.Objective("made", statistic, GATES.get(gate, gate), "seq-mean-token-mean", "test", flow=flow, cap=1.0)
    return tokenrl.objective(row, **more)


def padded():
    """(gate, statistic, flow, backend): all of them where each is compiled by itself.

    In the interpreter each is the same text, where a gate meets the flow, which takes its derivatives, but not the
    statistic, which is a number to it: every gate is tried with a flow and every statistic with every flow.
    """
    for backend in kernel_backends():
        for i, gate in enumerate(GATES):
            pairs = PAIRS
            if interpreted(backend):
                some = [pair for pair in PAIRS if pair[1] == ("through", "local")[i % 2]]
                pairs = [some[i // 2 % len(some)]]
            yield from ((gate, *pair, backend) for pair in pairs)


@pytest.mark.parametrize("gate,statistic,flow,backend", list(padded()))
def test_padded(gate, statistic, flow, backend):
    objective = made(gate, statistic, flow)
    case = away_from_edges(objective, batch, aggregation="token-mean")
    check(objective, case, backend, torch.float32, aggregation="token-mean")


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("statistic,flow", PAIRS)
def test_packed_fp64_without_segments(statistic, flow, backend):
    objective = made("ppo_clip", statistic, flow)

    def make(seed):
        case = packed(batch(seed))
        del case["segment_ids"], case["token_weight"]
        return case

    check(objective, away_from_edges(objective, make), backend, torch.float64)


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("statistic,flow", PAIRS)
def test_bounds_per_token_and_advantages_per_token(statistic, flow, backend):
    g = torch.Generator().manual_seed(3)
    bounds = [0.05 + 0.2 * torch.rand(5, 19, generator=g) for _ in range(3)]
    gate = LogBand(bounds[0], bounds[1], eps_dual=bounds[2] + 0.2, power=0.0)
    objective = made(gate, statistic, flow)

    def make(seed):
        case = batch(seed)
        sign = torch.randn(5, 19, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return case | {"advantages": torch.where(case["mask"], sign, torch.nan)}

    check(objective, away_from_edges(objective, make), backend, torch.float32)


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(aggregation, backend):
    objective = made("sapo", "token", "through")
    check(objective, batch(4, rows=8), backend, torch.float32, aggregation=aggregation)
    check(objective, batch(5, rows=8), backend, torch.float32, aggregation=aggregation, normalizer=12.5)


def beside_short_ones(seed):
    """A sequence of 40 tokens: blocks are as long as the mean sequence, and in the interpreter at least 16."""
    case = batch(seed, width=40, poison=False)
    case["mask"][1:, 3:] = False
    case["mask"][0, 20:] = torch.arange(20) % 7 != 3
    case["logp"][~case["mask"]] = torch.nan
    return case


@on_backends(tokenrl.OBJECTIVES, kernel_backends())
def test_rows_of_the_table_on_long_sequences(name, backend):
    """Several blocks of tokens per sequence: the scan state is carried between them."""

    def make(seed):
        case = packed(beside_short_ones(seed)) if interpreted(backend) else batch(seed, rows=3, width=1500)
        del case["segment_ids"]
        if name == "real":
            del case["token_weight"]
        case["old_logp"] = torch.where(case["mask"], case["logp"] - (case["logp"] - case["old_logp"]) / 8, torch.nan)
        return case

    packs = interpreted(backend) and AGGREGATIONS[tokenrl.OBJECTIVES[name].aggregation].over_width
    more = {"normalizer": 40.0} if packs else {}  # a packed batch has no width
    check(name, away_from_edges(name, make, **more), backend, torch.float32, **more)


@pytest.mark.parametrize("backend", kernel_backends())
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("edge", [-0.25, 0.25, 0.5])
def test_on_an_edge_the_gradient_is_a_one_sided_limit(edge, advantage, backend):
    gate = LogBand(0.25, 0.25, eps_dual=0.5, power=0.0)
    case = {
        "logp": torch.full((1, 1), edge - 1),
        "old_logp": torch.full((1, 1), -1.0),
        "advantages": torch.tensor([advantage]),
    }
    _, grad, _ = run(made(gate, "token", "through"), case, backend, torch.float64)
    inside = -advantage * torch.tensor(edge, dtype=torch.float64).exp()
    limits = [0.0, inside.item()]
    assert min(abs(grad.item() - limit) for limit in limits) < 1e-12


@pytest.mark.parametrize("backend", kernel_backends())
def test_the_same_input_gives_the_same_bits(backend):
    case = packed(beside_short_ones(1)) if interpreted(backend) else batch(1, rows=7, width=300)
    first, second = (run("ctpo", case, backend, torch.float32) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("backend", kernel_backends())
def test_a_weight_of_zero_hides_an_infinite_loss(backend):
    objective = tokenrl.objective("ppo", clamp=float("inf"))
    case = {"logp": torch.tensor([[0.0, -1.0]]), "old_logp": torch.tensor([[-200.0, -1.0]]),
            "advantages": torch.tensor([-1.0]), "token_weight": torch.tensor([[0.0, 1.0]])}  # fmt: skip
    loss, grad, _ = run(objective, case, backend, torch.float32)
    assert loss.item() == 0.5 and grad.tolist() == [[0.0, 0.5]]


def test_dual_clip_below_the_lower_bound_is_still_the_formula():
    case = batch(0)
    dual = torch.full(case["logp"].shape, 0.7, dtype=torch.float64)  # as a number it is refused
    objective = tokenrl.objective("ppo", gate=PpoClip(0.2, 0.2, dual=dual))
    for backend in kernel_backends():
        loss, grad, _ = run(objective, case, backend, torch.float64)
        truth = run(objective, case, "reference", torch.float64)
        close(loss, truth[0], truth[0])
        close(grad, truth[1], truth[1])
