"""The benchmark refuses wrong kernels, measures what it says, and its results are those of the README."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tokenrl
from bench import cases, heads, measure, readme
from bench.__main__ import app
from bench.report import markdown, readme_table

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench():
    def run(*arguments: str):
        return CliRunner().invoke(app, ["--device", "cpu", *arguments])

    return run


def test_check_only_passes(bench):
    result = bench("--check-only")
    assert result.exit_code == 0, result.output
    assert "within the tolerance rule" in result.output


@pytest.mark.parametrize("what", ["value", "gradient"])
def test_wrong_backend_is_refused(bench, monkeypatch, what):
    right = tokenrl.token_logprobs

    def wrong(logits, ids, *, backend):
        logp, entropy = right(logits, ids, backend=backend)
        if backend != "reference":
            off = 1e-4 * (logp if what == "value" else logp - logp.detach())
            logp = logp + off
        return logp, entropy

    monkeypatch.setattr(tokenrl, "token_logprobs", wrong)
    result = bench("--op", "token_logprobs", "--shape", "4x1003", "--dtype", "fp32", "--no-compile")
    assert result.exit_code == 1
    assert "wrong results" in result.output and f"{what}" in result.output.split("wrong results")[1]
    assert "| token_logprobs |" not in result.output


def test_backend_that_raises_is_refused(bench, monkeypatch):
    right = tokenrl.policy_loss

    def broken(*args, backend, **kwargs):
        if backend != "reference":
            raise RuntimeError("no kernel image")
        return right(*args, backend=backend, **kwargs)

    monkeypatch.setattr(tokenrl, "policy_loss", broken)
    result = bench("--check-only", "--op", "policy_loss")
    assert result.exit_code == 1
    assert "no kernel image" in result.output


def test_measures_and_writes(bench, tmp_path):
    small = ("--shape", "16x1000", "--op", "token_logprobs", "--op", "policy_loss", "--no-compile", "--repeats", "3")
    result = bench(*small, "--out", str(tmp_path), "--json", str(tmp_path / "again.json"))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "cpu.json").read_text())
    assert report == json.loads((tmp_path / "again.json").read_text())
    assert (tmp_path / "cpu.md").read_text() == markdown(report)
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    ours = [line for line in report["lines"] if line["ours"]]
    assert [line["op"] for line in ours] == ["token_logprobs", "policy_loss"]
    assert all(line["forward_ms"] > 0 and set(line["versus"]) >= {"eager"} for line in ours)
    assert {m["competitor"] for m in report["missing"]} >= {"compile", "Liger"}
    assert ours[1]["model_bytes_per_token"] == 21 and ours[1]["launches"] > 0 and ours[1]["host_syncs"] is None


@pytest.mark.parametrize("op", heads.OPS)
def test_heads_are_measured_against_bare_gemms(bench, tmp_path, op):
    result = bench(
        "--op", op, "--shape", "64x16x300", "--dtype", "fp32", "--repeats", "1", "--json", str(tmp_path / "r")
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "r").read_text())
    assert not report["lines"] and "over bare GEMMs" in markdown(report) and op in readme_table(report)
    lines = [line for line in report["heads"] if not line["variant"]]
    assert [line["backend"] for line in lines][:3] == ["bare GEMMs", "cpu", "eager"]
    bare, ours = lines[:2]
    flops = 2 * 64 * 16 * 300 * (4 if op == "linear_token_logprobs" else 3)
    assert bare["both_over_gemms"] == 1 and bare["both_gflops"] == pytest.approx(flops / bare["both_ms"] / 1e6)
    assert ours["both_over_gemms"] == pytest.approx(ours["both_ms"] / bare["both_ms"])
    assert all(ratio > 0 for ratio in ours["versus"]["eager"]) and ours["peak_bytes"][1] > 0


def test_a_wrong_gradient_of_the_head_is_refused(bench, monkeypatch):
    right = tokenrl.linear_policy_loss

    def wrong(*args, backend, **kwargs):
        loss, metrics = right(*args, backend=backend, **kwargs)
        return (loss if backend == "reference" else loss + 1e-3 * (loss - loss.detach())), metrics

    monkeypatch.setattr(tokenrl, "linear_policy_loss", wrong)
    result = bench("--check-only", "--op", "linear_policy_loss")
    assert result.exit_code == 1 and "linear_policy_loss half masked" in result.output.split("wrong results")[1]


def test_peak_memory_of_a_known_allocation():
    def call():
        first = torch.empty(1 << 20)  # 4 MiB, freed before the second
        del first
        second, third = torch.empty(1 << 21), torch.empty(1 << 19)
        return second.numel() + third.numel()

    assert measure.peak_memory(call, "cpu") == 4 * ((1 << 21) + (1 << 19))


def test_slow_calls_are_sampled_thrice(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLING_SECONDS", 0.0)
    counts = []
    measure.paired_medians({"call": lambda: counts.append(1)}, "cpu", 50)
    assert len(counts) == measure.FEWEST_SAMPLES


def test_limits_are_those_of_the_larger_need():
    found = measure.Limits(read=10.0, copy=5.0, exponentials=2.0, source="")
    assert found.least(cases.Work(100, 0, 1)) == (10.0, "read")
    assert found.least(cases.Work(100, 100, 1)) == (40.0, "copy")
    assert found.least(cases.Work(10, 0, 10)) == (5.0, "exp")


def test_limits_of_this_machine_are_plausible():
    found = measure.limits("cpu", 1 << 24)
    assert 1e8 < found.read < 1e13 and 1e8 < found.copy < 1e13 and 1e7 < found.exponentials < 1e12


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--op", "grpo"), (*cases.OPS, *heads.OPS)),
        (("--op", "linear_policy_loss", "--shape", "4x8"), ("linear_policy_loss bfloat16",)),
        (("--shape", "2048"), ("ROWSxCOLUMNS", "2048x151936")),
        (("--shape", "0x5"), ("ROWSxCOLUMNS",)),
        (("--dtype", "int8"), (*cases.DTYPES, "bf16")),
        (("--backend", "metal"), ("cuda", "cpu", "triton", "reference")),
        (("--device", "tpu"), ("cpu", "cuda")),
        (("--op", "policy_loss", "--dtype", "bf16"), ("policy_loss float32",)),
        (("--op", "policy_loss", "--dtype", "bf16", "--shape", "4x8"), ("policy_loss in float32",)),
        (("--threads", "0"), ("1",)),
    ],
)
def test_errors_name_what_is_accepted(bench, arguments, named):
    result = bench(*arguments)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert all(name in text for name in named), text


def test_readme_shows_the_results():
    report = json.loads(readme.RESULTS.read_text())
    assert readme.between((ROOT / "README.md").read_text()) == readme_table(report)


def test_readme_markers():
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    once = readme.rendered(text, {"lines": []})
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert readme.rendered(once, {"lines": []}) == once
    with pytest.raises(ValueError, match="<!-- bench -->"):
        readme.between("no markers")
