"""tokenrl plan: its peaks are those of the calls, its flops those of the formulas; the command, table and errors."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from paths import ROOT
from typer.testing import CliRunner

from bench import committed, plan_table
from bench.measure import peak_memory
from tokenrl import cli
from tokenrl.instruments import machine_limits
from tokenrl.instruments.machine_limits import Limits
from tokenrl.instruments.plan import machines, model_config, report
from tokenrl.instruments.plan.gpus import GPUS
from tokenrl.instruments.plan.model import HOST, Machine, Shape, Step, Way
from tokenrl.instruments.plan.network import Network, all_gather
from tokenrl.instruments.plan.ways import ways
from tokenrl.instruments.plan.world import World

LARGE = Shape(32768, 5120, 151936, torch.bfloat16)
SLOW = Limits(read=10.0, copy=5.0, exponentials=2.0, source="a test")


def of(shape: Shape, device: str = "cpu", budget: int | None = None) -> dict[str, Way]:
    return {way.name: way for way in ways(shape, device, budget)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("budget", [64 << 20, 1 << 20], ids=["one chunk", "many"])
def test_the_peaks_are_within_a_quarter_of_those_of_the_calls(dtype, budget):
    shape = Shape(256, 64, 8192, dtype)
    planned, calls = of(shape, "cpu", budget), plan_table.calls(shape, budget)
    assert set(planned) <= set(calls) == set(HOST)
    for name, way in planned.items():
        calls[name]()
        assert way.peaks[1] == pytest.approx(peak_memory(calls[name], "cpu"), rel=0.25), name


def test_two_passes_are_planned_where_a_call_makes_them():
    shape = Shape(256, 64, 8192, torch.float32)
    assert "linear_policy_loss, 2 passes" not in of(shape, "cpu", 64 << 20)
    assert {"linear_policy_loss", "linear_policy_loss, 2 passes"} <= set(of(shape, "cpu", 3 << 20))
    assert "linear_policy_loss" not in of(shape, "cpu", 1 << 20)


@pytest.mark.parametrize("shards", [1, 4])
def test_the_flops_are_those_of_the_formulas(shards):
    shape = dataclasses.replace(LARGE, shards=shards)
    gemm = 2 * shape.tokens * shape.hidden * shape.vocab // shards
    flops = {name: sum(step.flops for step in way.both) / gemm for name, way in of(shape, "cuda").items()}
    assert flops == {
        "eager": 3, "token_logprobs": 3, "linear_token_logprobs": 4, "linear_policy_loss": 3,
        "linear_policy_loss, 2 passes": 4,
    }  # fmt: skip


def test_logits_that_fit_are_not_computed_again():
    """From hidden states either; where they do not, no more than a part of them is held."""
    shape = Shape(256, 64, 8192, torch.float32)
    gemm, logits = 2 * shape.tokens * shape.hidden * shape.vocab, shape.logits * 4
    for budget, times in ((64 << 20, 3), (logits, 4)):
        way = of(shape, "cpu", budget)["linear_token_logprobs"]
        assert sum(step.flops for step in way.both) == times * gemm and (way.peaks[0] >= logits) == (times == 3)


@pytest.mark.parametrize("name", HOST)
def test_shards_hold_and_compute_less_and_send_what_they_have(name):
    alone, shared = (of(dataclasses.replace(LARGE, shards=k), "cuda")[name] for k in (1, 8))
    assert shared.peaks[1] < alone.peaks[1] and not any(step.sent for step in alone.both)
    hidden, rows = 2 * LARGE.states * 4 * 7 // 8, LARGE.tokens * (2 * 7 * 12 // 8 if name == "eager" else 7 * 16)
    assert sum(step.sent.bytes for step in shared.both if step.sent) == hidden + rows


def machine(device: str, launch: float = 0.5) -> Machine:
    return Machine("a test", device, SLOW, {"logits": 4.0}, launch, None, Network(link=100.0, latency=1.0), "")


def test_a_step_takes_the_larger_of_its_needs():
    work = machine_limits.Work(20, 0, 2)
    found = machine("cpu")
    assert found.seconds(Step("reads", work)) == 2
    assert found.seconds(Step("writes", machine_limits.Work(20, 20, 2))) == 8
    assert found.seconds(Step("computes", work, flops=40, gemm="logits")) == 10
    assert found.seconds(Step("sends", work, sent=all_gather(4, 100, times=2))) == 2 + 2 * 1 + 3


def test_a_gpu_works_while_the_host_launches():
    way = Way("eager", (Step("reads", machine_limits.Work(1000, 0, 0)),), (), (0, 0))
    forward, both = HOST["eager"]
    assert machine("cpu").times(way) == (100 + forward / 2, 100 + both / 2)
    assert machine("cuda").times(way) == (100, 100)
    assert machine("cuda", 4.0).times(way) == (4 * forward, 4 * both)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_plans(name):
    found = report.plan(LARGE, name, World(8), None, {})
    assert found["source"].startswith(GPUS[name].source) and found["memory_bytes"] == GPUS[name].memory
    seconds = {row["way"]: row["both_seconds"] for row in found["ways"] if row["shards"] == 1}
    least = 6 * LARGE.tokens * LARGE.hidden * LARGE.vocab / GPUS[name].half
    assert all(least < taken < 3 * least for taken in seconds.values())
    single = report.plan(dataclasses.replace(LARGE, dtype=torch.float32), name, World(), None, {})
    assert single["gemm_flops_per_second"]["logits"] == pytest.approx(0.8 * GPUS[name].single)


def row(way: str, seconds: float, peak: int, fits: bool = True, shards: int = 1) -> dict:
    return {"way": way, "both_seconds": seconds, "both_peak_bytes": peak, "fits": fits, "shards": shards}


@pytest.mark.parametrize(
    "rows, way, shards",
    [
        ([row("eager", 1.2, 90), row("a", 1.0, 50), row("b", 1.05, 20), row("c", 1.5, 1)], "b", 1),
        ([row("eager", 1.2, 90, False), row("a", 1.0, 50, False), row("b", 2.0, 20)], "b", 1),
        ([row("eager", 1.2, 90, False), row("eager", 0.3, 9, True, 8), row("a", 0.2, 9, True, 8)], "a", 8),
        ([row("eager", 1.2, 90, False)], None, None),
    ],
)
def test_the_way_to_use(rows, way, shards):
    found = report.chosen(rows)
    assert (found["way"], found.get("shards")) == (way, shards)


def test_a_measured_machine_computes_and_copies():
    found = machines.measured("cpu", Shape(64, 32, 1000, torch.float32))
    assert set(found.gemms) == {"logits", "hidden", "weight"} and min(found.gemms.values()) > 1e6
    assert found.limits.copy > 1e8 and 0 < found.launch < 1e-2 and "threads" in found.name


def test_the_committed_plan_is_near_what_it_takes():
    rows = json.loads((ROOT / "bench" / "results" / "plan.json").read_text())["plan"]
    assert {row["way"] for row in rows} == set(HOST) and len({tuple(row["shape"]) for row in rows}) == len(
        plan_table.CASES
    )
    for row in rows:
        assert abs(row["planned_seconds"] / row["seconds"] - 1) < 0.25, row
        assert abs(row["planned_bytes"] / row["bytes"] - 1) < 0.25, row


def test_the_bench_compares_it(monkeypatch):
    monkeypatch.setattr(plan_table, "TURNS", 1)
    monkeypatch.setattr(plan_table, "CASES", ((Shape(64, 8, 500, torch.float32), 1 << 20),))
    found = plan_table.measure()
    assert [row["way"] for row in found] == [*of(Shape(64, 8, 500, torch.float32), "cpu", 1 << 20)]
    assert all(row["seconds"] > 0 and row["planned_seconds"] > 0 for row in found)


def test_committed_results_of_the_same_shape_stand_beside(tmp_path, monkeypatch):
    line = next(
        line for line in json.loads((ROOT / "bench/results/cpu.json").read_text())["lines"]
        if line["op"] == "linear_policy_loss" and line["ours"] and line["variant"] == "all active"
    )  # fmt: skip
    shape = Shape(*line["shape"], getattr(torch, line["dtype"]))
    found = committed.committed(shape, "cpu")
    assert set(found) == {"eager", "linear_token_logprobs", "linear_policy_loss"}
    assert found["linear_policy_loss"]["seconds"] == line["both_ms"] / 1e3
    assert committed.committed(dataclasses.replace(shape, hidden=7), "cpu") == {}
    report = {"device": "cuda", "machine": "NVIDIA H200, Python 3; read", "lines": [line]}
    (tmp_path / "cuda.json").write_text(json.dumps(report))
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    assert set(committed.committed(shape, "h200")) == {"linear_policy_loss"}
    assert committed.committed(shape, "b200") == committed.committed(shape, "cpu") == {}


def called(*arguments: str, width: int = 80):
    return CliRunner().invoke(cli.application(), ["plan", *arguments], env={"COLUMNS": str(width)})


HEAD = ("--tokens", "32768", "--hidden", "5120", "--vocab", "151936", "--dtype", "bf16")


def test_the_table_fits_80_columns():
    for gpu in ("h200", "rtx-4090"):
        outcome = called(*HEAD, "--gpu", gpu)
        assert outcome.exit_code == 0, outcome.output
        lines = outcome.output.splitlines()
        assert max(map(len, lines)) <= 80 and "…" not in outcome.output
        for name in HOST:
            rows = [line for line in lines if re.match(rf" {re.escape(name)}  ", line)]
            assert len(rows) == 2 and all(len(re.split(r" {2,}", line.strip())) == 6 for line in rows)
        assert "use linear_policy_loss:" in outcome.output and "each of 8 vocabulary shards" in outcome.output
    assert "59.74 !" in outcome.output and "more than 90% of the memory" in outcome.output


def test_json_is_the_plan():
    outcome = called(*HEAD, "--gpu", "h200", "--tp", "4", "--budget", "4 GB", "--json")
    found = json.loads(outcome.output)
    assert {row["shards"] for row in found["ways"]} == {1, 4} and found["use"]["way"] == "linear_policy_loss"
    assert found["ways"] == report.plan(LARGE, "h200", World(4), 4 * 10**9, {})["ways"]
    smaller = json.loads(called(*HEAD, "--gpu", "h200", "--tp", "1", "--json").output)
    assert {row["shards"] for row in smaller["ways"]} == {1}
    peaks = [
        next(r for r in f["ways"] if r["way"] == "linear_policy_loss")["both_peak_bytes"] for f in (smaller, found)
    ]
    assert peaks[0] < peaks[1]


def test_this_machine_is_measured_and_has_its_results():
    outcome = called("--tokens", "64", "--hidden", "32", "--vocab", "1000", "--gpu", "cpu", "--json")
    found = json.loads(outcome.output)
    assert outcome.exit_code == 0 and found["memory_bytes"] is None and "measured" in found["source"]
    assert {row["shards"] for row in found["ways"]} == {1}
    assert all(row["fits"] and row["both_seconds"] > 0 for row in found["ways"])


def test_the_shell_completes_gpus_and_options():
    def completed(words):
        env = {"_TOKENRL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        return CliRunner().invoke(cli.application(), env=env, prog_name="tokenrl").output.split()

    assert completed("tokenrl plan --machine la") == ["launch=", "latency="]
    assert completed("tokenrl plan --gpu h") == ["h100-sxm", "h100-pcie", "h200"]
    assert completed("tokenrl plan --sequ") == ["--sequences"] and completed("tokenrl bench --check") == [
        "--check-only"
    ]


CONFIGS = {
    "plain": ({"hidden_size": 64, "vocab_size": 1000, "torch_dtype": "float16"}, (64, 1000, "fp16")),
    "new": ({"hidden_size": 64, "vocab_size": 1000, "dtype": "bfloat16", "tie_word_embeddings": True},
            (64, 1000, "bf16")),
    "gpt2": ({"n_embd": 64, "vocab_size": 1000}, (64, 1000, "bf16")),
    "several": ({"hidden_size": 7, "text_config": {"hidden_size": 64, "vocab_size": 1000}, "dtype": "float32"},
                (64, 1000, "fp32")),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_models_config_gives_the_head(name, tmp_path):
    config, (hidden, vocab, dtype) = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "config.json"):
        found = json.loads(called("--tokens", "64", "--gpu", "l4", "--model", str(path), "--json").output)
        assert (found["hidden"], found["vocab"], found["dtype"]) == (hidden, vocab, dtype)
    assert found["tied"] == model_config.read(tmp_path).tied == ("tie_word_embeddings" in config)
    text = called("--tokens", "64", "--gpu", "l4", "--model", str(tmp_path)).output
    assert found["tied"] == ("the head is the embedding: 0.00 GB more" in text)
    given = json.loads(
        called("--tokens", "64", "--gpu", "l4", "--model", str(tmp_path), "--vocab", "9", "--json").output
    )
    assert (given["hidden"], given["vocab"]) == (hidden, 9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((*HEAD, "--gpu", "h20"), "gpu: got 'h20', accepted: a100-40gb, .*Did you mean 'h200'"),
        ((*HEAD, "--gpu", "rtx4090"), "Did you mean 'rtx-4090'"),
        ((*HEAD[:-1], "bf6", "--gpu", "h200"), "dtype: got 'bf6', accepted: bf16, fp16, fp32. Did you mean 'bf16'"),
        (("--tokens", "8", "--vocab", "9"), "hidden: got None, accepted: --hidden N, or --model config.json"),
        ((*HEAD, "--budget", "4 apples"), "budget: got '4 apples', accepted: a number of bytes, or as '512 MB'"),
        ((*HEAD, "--budget", "1 KB", "--gpu", "h200"), "memory_budget: got 1000 bytes, accepted: more"),
        ((*HEAD, "--model", "nowhere.json"), "No such file or directory: 'nowhere.json'"),
    ],
)
def test_errors_name_what_is_accepted(arguments, message):
    outcome = called(*arguments)
    assert outcome.exit_code == 1 and re.match(f"tokenrl plan: .*{message}", outcome.output), outcome.output


@pytest.mark.parametrize(
    "text, message",
    [("{", "no JSON"), ("[]", "without hidden_size and vocab_size"), ('{"vocab_size": 3}', "without hidden_size,")],
)
def test_a_config_that_describes_no_head_is_named(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(text)
    outcome = called("--tokens", "8", "--gpu", "l4", "--model", "config.json")
    assert outcome.exit_code == 1 and "tokenrl plan: model: got " in outcome.output and message in outcome.output
