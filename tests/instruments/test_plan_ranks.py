"""tokenrl plan --tp --cp --dp: its model is that of docs/guides/plan.md, to numbers worked out by hand; its tables are
the committed ones; more ranks, tokens and slower networks count the right way."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import tokenrl
from bench import ranks
from bench.measure import peak_memory
from tokenrl import cli
from tokenrl.distributed import VocabShard
from tokenrl.instruments.plan import machines, world
from tokenrl.instruments.plan.model import Shape
from tokenrl.instruments.plan.network import Network, all_gather, all_reduce
from tokenrl.instruments.plan.ways import EXCHANGE, HIDDEN_SUM, ways
from tokenrl.instruments.plan.world import GEMMS, World

STATED = ranks.stated()
NETWORK = STATED.network
WIDTH = 4096


def batch(tokens: int, vocab: int) -> Shape:
    return Shape(tokens, WIDTH, vocab, torch.bfloat16)


def seconds(tokens: int, vocab: int, tp: int) -> dict[str, float]:
    return {x["part"]: x["seconds"] for x in world.parts(batch(tokens, vocab), World(tp), STATED)}


# vocabulary, tokens, ranks: GEMMs ms, statistics us, hidden's sum ms, as 6 N D V / (W F), alpha + 16 N (W - 1) / B and
# alpha + 2 (W - 1) / W 4 N D / B have them, each of four chunks, but the first of one.
BY_HAND = (
    (151936, 1024, 8, 0.797, 20.3, 0.104),
    (151936, 8192, 2, 25.49, 80.4, 0.463),
    (151936, 8192, 4, 12.74, 81.1, 0.655),
    (151936, 8192, 8, 6.373, 82.6, 0.751),
    (151936, 32768, 8, 25.49, 90.5, 2.764),
    (151936, 32768, 16, 12.75, 346.8, 22.55),
    (32000, 8192, 8, 1.342, 82.6, 0.751),
    (32000, 32768, 16, 2.684, 346.8, 22.55),
)


@pytest.mark.parametrize("vocab, tokens, tp, gemms, exchange, hidden_sum", BY_HAND)
def test_the_parts_are_those_of_the_formulas(vocab, tokens, tp, gemms, exchange, hidden_sum):
    found = seconds(tokens, vocab, tp)
    assert 1e3 * found[GEMMS] == pytest.approx(gemms, rel=2e-3)
    assert 1e6 * found[EXCHANGE] == pytest.approx(exchange, rel=2e-3)
    assert 1e3 * found[HIDDEN_SUM] == pytest.approx(hidden_sum, rel=2e-3)


@pytest.mark.parametrize(
    "vocab, tokens, tp, share",
    [
        (151936, 1024, 8, 87), (151936, 8192, 8, 97), (151936, 32768, 16, 49), (32000, 8192, 8, 87),
        (32000, 32768, 16, 12),
    ],
)  # fmt: skip
def test_what_is_sent_hides_behind_the_next_chunk(vocab, tokens, tp, share):
    """Per cent of the time that is GEMMs', where nothing else is computed."""
    way = world.way_of(replace(batch(tokens, vocab), shards=tp), World(tp), "cuda", None)
    alone = tuple(step for step in way.both if step.gemm)
    sent = tuple(step._replace(work=step.work.__class__(0, 0, 0)) for step in way.both if step.sent)
    assert way.chunks == min(4, tokens // 1024)
    taken = STATED.in_turn((*alone, *sent), way.chunks)
    assert round(100 * sum(map(STATED.computed, alone)) / taken) == share


@pytest.mark.parametrize(
    "vocab, node, between",
    [
        (32000, (14, 28), (2, 4)),
        (128256, (56, 112), (7, 14)),
        (151936, (66, 133), (9, 17)),
        (262144, (115, 229), (15, 29)),
    ],
)
def test_where_the_sum_takes_as_long_as_the_gemms(vocab, node, between):
    for bandwidth, expected in ((NETWORK.link, node), (NETWORK.network, between)):
        assert tuple(round(world.most_ranks(vocab, 600e12, bandwidth, size)) for size in (4, 2)) == expected


@pytest.mark.parametrize(
    "cp, tokens, microseconds",
    [(2, 2**15, 82), (8, 2**17, 179), (16, 2**17, 212), (8, 2**20, 1084), (16, 2**20, 1184)],
)
def test_the_log_probs_of_a_context(cp, tokens, microseconds):
    sent = world.context_gather(tokens, cp, token_bytes=4)
    assert sent.bytes == 4 * tokens * (cp - 1) / cp
    assert round(1e6 * world.context_seconds(tokens, STATED, sent)) == pytest.approx(microseconds, abs=1)


@pytest.mark.parametrize("count, weights, metrics", [(8, 40, 20), (64, 122, 61), (256, 268, 134), (1024, 851, 423)])
def test_the_exchanges_of_a_batch(count, weights, metrics):
    found = {name: NETWORK.seconds(sent) for name, sent in world.data_collectives(World(dp=count)).items()}
    assert 1e6 * found["global_weights"] == pytest.approx(weights, abs=1)
    assert 1e6 * found["metrics"] == pytest.approx(metrics, abs=1.5)


def test_a_group_spans_the_nodes_of_its_ranks():
    """Ranks of a group are so many apart: eight side by side share a node, two that are eight apart do not."""
    for stride, count, nodes in ((1, 8, 1), (1, 9, 2), (8, 2, 2), (4, 4, 2), (64, 16, 16), (2, 1, 1)):
        assert NETWORK.nodes(all_gather(count, 1, stride=stride)) == nodes
    assert NETWORK.alpha(all_reduce(64, 1)) == pytest.approx(40e-6 + 3 * 6e-6)
    assert NETWORK.alpha(all_gather(64, 1)) == pytest.approx(40e-6 + 7 * 3e-6)
    assert NETWORK.seconds(all_gather(1, 10**9)) == 0


def test_it_grows_and_shrinks_the_right_way():
    at = {tp: seconds(32768, 151936, tp) for tp in (2, 4, 8, 16, 64, 1024)}
    for less, more in zip(at, [*at][1:], strict=False):
        assert at[more][GEMMS] < at[less][GEMMS] and at[more][HIDDEN_SUM] > at[less][HIDDEN_SUM]
    shape = batch(32768, 151936)
    pays = [world.pays_up_to(replace(shape, vocab=vocab), STATED) for vocab in (32000, 151936, 262144)]
    assert pays == sorted(pays) == [8, 8, 16]
    wider = machines.changed(STATED, {"network": 350e9, "network_latency": 2e-5})
    assert world.pays_up_to(shape, wider) > 8 > world.pays_up_to(shape, machines.changed(STATED, {"link": 2e10}))
    for name, worse in (
        ("link", 1e11),
        ("latency", 1e-4),
        ("flops", 3e14),
        ("bandwidth", 1e12),
        ("exponentials", 1e11),
    ):
        slower = machines.changed(STATED, {name: worse})
        assert world.head_seconds(replace(shape, shards=8), slower) > world.head_seconds(
            replace(shape, shards=8), STATED
        )
    whole, parted = (world.described(shape, World(8, cp), STATED) for cp in (1, 2))
    assert parted["tokens"] == whole["tokens"] // 2 and parted["peak_bytes"] < whole["peak_bytes"]


def test_gathering_the_weight_sends_less_from_so_many_tokens_on():
    shape = replace(batch(32768, 151936), shards=8)
    whole, tokens = world.gathered_weight(shape)
    assert whole == 6 * 151936 * WIDTH * 7 / 8
    sent = world.described(replace(batch(round(tokens), 151936)), World(8), STATED)["head_bytes"]
    assert sent == pytest.approx(whole, rel=1e-4)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_peak_of_a_rank_is_that_of_its_call(dtype, alone):
    """The rank of a vocabulary of which it has half, by a group of one that has all of the half."""
    shape, budget = Shape(4096, 64, 4096, dtype, shards=2), 24 << 20
    (way,) = (way for way in ways(shape, "cpu", budget) if way.name == "linear_policy_loss")
    assert way.chunks == 4
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 512, 64, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(shape.columns, 64, generator=g).mul_(0.1).to(dtype).requires_grad_()
    ids = torch.randint(shape.columns, (8, 512), generator=g)
    rest = (torch.full((8, 512), -7.6), torch.randn(8, generator=g))
    shard = VocabShard(alone, [shape.columns])

    def call():
        loss, _ = tokenrl.linear_policy_loss("ctpo", hidden, weight, ids, *rest, memory_budget=budget, vocab=shard)
        return torch.autograd.grad(loss, (hidden, weight))

    call()
    assert way.peaks[1] == pytest.approx(peak_memory(call, "cpu"), rel=0.25)


def test_the_committed_tables_are_what_the_model_says():
    committed, found = json.loads(ranks.RESULT.read_text()), ranks.simulated()
    for name in ("heads", "vocabularies", "worlds"):
        for now, then in zip(found[name], committed[name], strict=True):
            assert now.keys() == then.keys()
            for key in now:
                assert now[key] == pytest.approx(then[key], rel=1e-9), (name, key)
    assert [row["ranks"] for row in found["worlds"]] == [8, 16, 32, 64, 128, 256, 512, 1024]


HEAD = ("--tokens", "32768", "--hidden", "4096", "--vocab", "151936", "--gpu", "h100-sxm")


def called(*arguments: str):
    return CliRunner().invoke(cli.application(), ["plan", *HEAD, *arguments], env={"COLUMNS": "80"})


def test_the_command_says_it():
    outcome = called("--tp", "8", "--cp", "2", "--dp", "4", "--machine", "flops=6e14", "--machine", "network=2.5e10")
    assert outcome.exit_code == 0, outcome.output
    text = " ".join(outcome.output.split())
    assert max(map(len, outcome.output.splitlines())) <= 80 and "…" not in text
    for said in (
        "tp 8 x cp 2 x dp 4, 64 ranks: each 16,384 tokens and 18,992 rows", "each of 16 ranks, tp 8 x cp 2",
        "all_reduce 8 1 469.76", "pays up to 8 ranks", "in a node, 5 between nodes", "351 GB/s and 25 GB/s",
        "given: flops 6e+14, network 2.5e+10", "global_weights, once a step all_gather 4 2",
    ):  # fmt: skip
        assert said in text, said
    assert "all_reduce" not in called().output
    found = json.loads(called("--tp", "8", "--dp", "2", "--sequences", "64", "--json").output)["world"]
    assert found["ranks"] == 16 and found["network"]["node"] == 8
    assert next(x for x in found["parts"] if x["part"] == "global_weights")["bytes"] == 8 + 24 * 64


def test_ranks_that_are_all_here_send_for_nothing():
    outcome = CliRunner().invoke(
        cli.application(), ["plan", "--tokens", "64", "--hidden", "8", "--vocab", "256", "--gpu", "cpu", "--tp", "2"]
    )
    assert outcome.exit_code == 0 and "network: free" in outcome.output and "inf" not in outcome.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--machine", "flop=6e14"), "machine: got 'flop', accepted: flops, .*Did you mean 'flops'"),
        (("--machine", "flops=fast"), "machine flops: got fast, accepted: flops=NUMBER"),
        (("--machine", "link"), "machine link: got , accepted: link=NUMBER"),
        (("--machine", "link=0"), "machine link: got 0, accepted: above 0"),
        (("--machine", "latency=-1"), "machine latency: got -1, accepted: 0 or more"),
        (("--machine", "node=0.5"), "machine node: got 0.5, accepted: at least 1 rank"),
        (("--machine", "memory=nan"), "machine memory: got nan, accepted: above 0"),
    ],
)
def test_wrong_numbers_are_named(arguments, message):
    outcome = called("--tp", "8", *arguments)
    assert outcome.exit_code == 1 and outcome.output.startswith("tokenrl plan: machine")
    assert re.search(message, outcome.output), outcome.output


@pytest.mark.parametrize("name", ["--tp", "--cp", "--dp", "--sequences"])
def test_counts_of_ranks_are_positive(name):
    assert called(name, "0").exit_code == 2


def test_a_free_network_has_no_last_rank():
    free = replace(STATED, network=Network(link=math.inf, network=math.inf, latency=0, network_latency=0))
    assert world.most_ranks(32000, 600e12, math.inf) == math.inf
    assert world.pays_up_to(batch(32768, 32000), free) > world.pays_up_to(batch(32768, 32000), STATED)
