"""The benchmark refuses wrong kernels, measures what it says, and its results are those of the pages."""

import json
import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from typer.testing import CliRunner

import tokenrl
from bench import __main__ as main
from bench import cases, cliffs, linear_cases, measure, overhead, pages, trl_step
from bench.lines import BARE
from bench.report import markdown, short_table
from tokenrl.instruments import machine_limits


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(main, "keep_freed_memory", lambda: "malloc as it is")  # the other tests share this process

    def run(*arguments: str):
        return CliRunner().invoke(main.app, ["--device", "cpu", *arguments], env={"COLUMNS": "120"})

    return run


def test_check_only_passes(bench):
    result = bench("--check-only")
    assert result.exit_code == 0, result.output
    assert "14 checks: every value and gradient is within the tolerance rule" in result.output


@pytest.mark.parametrize("shape", ["24x16x1003", "160x16x211"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_check_only_of_the_linear_ops(bench, shape, dtype):
    result = bench("--check-only", "--shape", shape, "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert "3 checks" in result.output


@pytest.mark.parametrize("what", ["value", "gradient 0", "gradient 1"])
def test_wrong_linear_op_is_refused(bench, monkeypatch, what):
    """A gradient alone is wrong where something without a value of its own is added."""
    right = tokenrl.linear_policy_loss

    def wrong(objective, hidden, weight, *rest, backend, **more):
        loss, metrics = right(objective, hidden, weight, *rest, backend=backend, **more)
        if backend != "reference":
            x = {"value": loss, "gradient 0": hidden, "gradient 1": weight}[what]
            loss = loss + (0.1 * loss if what == "value" else (x - x.detach()).sum())
        return loss, metrics

    monkeypatch.setattr(tokenrl, "linear_policy_loss", wrong)
    result = bench("--check-only", "--op", "linear_policy_loss", "--dtype", "fp32")
    assert result.exit_code == 1
    wrongs = result.output.split("wrong results")[1]
    assert what in wrongs and "all active" in wrongs and "half masked" in wrongs


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
    assert "% of limit" not in result.output


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


@pytest.fixture(scope="module")
def linear_report(tmp_path_factory):
    """Of a tiny real run of the linear ops, as JSON, and its folder."""
    folder = tmp_path_factory.mktemp("linear")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "keep_freed_memory", lambda: "malloc as it is")
        patch.setattr("bench.linear_competitors.liger_why_not_compiled", lambda case: "not asked in tests")
        arguments = ["--device", "cpu", "--shape", "64x8x301", "--dtype", "fp32", "--repeats", "3"]
        result = CliRunner().invoke(main.app, [*arguments, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return json.loads((folder / "cpu.json").read_text()), folder


def test_bare_gemms_are_the_limit(linear_report):
    """Three of either: logits of this size are kept."""
    report, _ = linear_report
    flops = 2 * 64 * 8 * 301
    for op in ("linear_token_logprobs", "linear_policy_loss"):
        mine = [line for line in report["lines"] if line["op"] == op]
        assert mine[0]["backend"] == BARE and not mine[0]["ours"]
        bare = {line["variant"]: line for line in mine if line["backend"] == BARE}
        for line in mine:
            share = 0.5 if line["variant"] == "half masked" and line["backend"] != BARE else 1
            for key, count in (("forward", 1), ("both", 3)):
                if line[f"{key}_ms"] is None:
                    assert line["backend"] == "Liger" and key == "forward"
                    continue
                limit = bare[line["variant"]][f"{key}_ms"]
                assert line[f"{key}_over_gemms"] == pytest.approx(line[f"{key}_ms"] / limit)
                assert line[f"{key}_percent"] == pytest.approx(100 * share * limit / line[f"{key}_ms"])
                assert line[f"{key}_gflops"] == pytest.approx(count * share * flops / line[f"{key}_ms"] / 1e6)


def test_linear_ops_beside_their_competitors(linear_report):
    report, folder = linear_report
    ours = [line for line in report["lines"] if line["ours"]]
    assert [line["variant"] for line in ours] == ["", "all active", "half masked"]
    assert all({"eager", "TRL"} <= set(line["versus"]) for line in ours) or "TRL" in str(report["missing"])
    assert all(line["both_peak_bytes"] > 0 and line["samples"] == [3, 3] for line in ours)
    grpo = [line for line in report["lines"] if line["backend"] == "Liger"]
    assert all(line["value_error_ratio"] is None and line["forward_ms"] is None for line in grpo)
    remarks = [m["reason"] for m in report["missing"] if m["competitor"] == "Liger"]
    assert len(remarks) == 2 and all("GRPO" in r or "not installed" in r for r in remarks)
    text = (folder / "cpu.md").read_text()
    assert text == markdown(report) and "x bare GEMMs" in text and "linear_policy_loss, half masked" in text
    assert (folder / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "3 GEMMs" in short_table(report) and "vs Liger" in short_table(report)


def test_settled_log_ratios_are_far_from_the_clip():
    """Of the sums over sqrt(t): the bounds are -0.025 and 0.05, rounding of bf16 logits moves them by 0.003."""
    ratios = linear_cases.log_ratios((8, 256), torch.Generator().manual_seed(0), True)
    sums = ratios.double().cumsum(-1) / torch.arange(1, 257).sqrt()
    assert min((sums + 0.025).abs().min(), (sums - 0.05).abs().min()) > 0.03
    assert (sums < -0.025).any() and (sums > 0.05).any() and ((sums > -0.025) & (sums < 0.05)).any()


def test_half_masked_keeps_the_first_half_of_each_sequence():
    case = cases.make(cases.Spec("linear_policy_loss", (160, 8, 50), "float32", "half masked"), "cpu")
    mask = case.inputs[5]
    assert mask.shape == (8, 20) and mask[:, :10].all() and not mask[:, 10:].any() and case.gemms.share == 0.5
    assert case.held.inputs[0].shape == (8, 8, 8) and case.held.inputs[1].shape == case.inputs[1].shape


MEMORY = """
import resource
from bench.machine import keep_freed_memory
import torch
print(keep_freed_memory())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 24).zero_()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(3)))  # a page that the machine took back in between says nothing
"""


def test_freed_memory_is_kept():
    found = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    how, faults = found.splitlines()
    assert how.startswith("malloc as it is") or int(faults) < 32


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
    measure.paired_samples({"call": lambda: counts.append(1)}, "cpu", 50)
    assert len(counts) == measure.FEWEST_SAMPLES


def test_very_slow_rivals_are_sampled_once(monkeypatch):
    monkeypatch.setattr(measure, "SLOW_SECONDS", 0.0)
    calls = {"ours": int, "rival": int}
    found = measure.paired_samples(calls, "cpu", 5, frozenset({"rival"}))
    assert {name: len(times) for name, times in found.items()} == {"ours": 5, "rival": 1}


def test_limits_are_those_of_the_larger_need():
    found = machine_limits.Limits(read=10.0, copy=5.0, exponentials=2.0, source="")
    assert found.least(machine_limits.Work(100, 0, 1)) == (10.0, "read")
    assert found.least(machine_limits.Work(100, 100, 1)) == (40.0, "copy")
    assert found.least(machine_limits.Work(10, 0, 10)) == (5.0, "exp")


def test_limits_of_this_machine_are_plausible():
    found = machine_limits.limits("cpu", 1 << 24)
    assert 1e8 < found.read < 1e13 and 1e8 < found.copy < 1e13 and 1e7 < found.exponentials < 1e12


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--op", "grpo"), cases.OPS),
        (("--shape", "2048"), ("ROWSxCOLUMNS", "2048x151936")),
        (("--shape", "0x5"), ("ROWSxCOLUMNS",)),
        (("--dtype", "int8"), (*cases.DTYPES, "bf16")),
        (("--backend", "metal"), ("cuda", "cpu", "triton", "reference")),
        (("--device", "tpu"), ("cpu", "cuda")),
        (("--op", "policy_loss", "--dtype", "bf16"), ("policy_loss float32",)),
        (("--op", "policy_loss", "--dtype", "bf16", "--shape", "4x8"), ("policy_loss in float32",)),
        (("--threads", "0"), ("1",)),
        (("--shape", "1x2x3x4"), ("TOKENSxWIDTHxCOLUMNS", "2048x1024x151936")),
        (("--op", "linear_token_logprobs", "--shape", "4x8"), ("linear_token_logprobs", "three numbers")),
        (("--op", "token_logprobs", "--shape", "4x8", "--shape", "4x8x9"), ("token_logprobs", "ROWSxCOLUMNS")),
        (("--op", "linear_policy_loss", "--shape", "12x8x9"), ("multiple of 8",)),
    ],
)
def test_errors_name_what_is_accepted(bench, arguments, named):
    result = bench(*arguments)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert all(name in text for name in named), text


@pytest.mark.parametrize("page, name", [(page, name) for page, names in pages.PAGES.items() for name in names])
def test_pages_show_the_results(page, name):
    assert pages.between((ROOT / page).read_text(), name) == pages.table(name)


@pytest.mark.parametrize("name", pages.TABLES)
def test_page_markers(name):
    begin, end = pages.markers(name)
    once = pages.rendered(f"before\n{begin}\nold\n{end}\nafter\n", name, "table")
    assert once == f"before\n{begin}\ntable\n{end}\nafter\n"
    assert pages.rendered(once, name, "table") == once
    with pytest.raises(ValueError, match=begin):
        pages.between("no markers", name)


def test_overhead_times_every_call_in_additions(bench, monkeypatch):
    monkeypatch.setattr(overhead, "ROUNDS", 2)
    result = bench("--op", "overhead")
    assert result.exit_code == 0, result.output
    assert all(f"\n {name}  " in result.output for name in overhead.AIMS)


def test_cliffs_are_ratios_to_plain_neighbours(bench, monkeypatch):
    monkeypatch.setattr(cliffs, "TURNS", 1)
    monkeypatch.setattr(cliffs, "ROWS", 2)
    result = bench("--op", "cliffs")
    assert result.exit_code == 0, result.output
    for name in ("softcap, forward", "temperature 0.05, forward + backward", "dhpo", "real, 8192 rollouts, a row"):
        assert re.search(rf"^ {re.escape(name)}  .*  \d+\.\d\d +[13]\.?\d* *$", result.output, re.M), name


def test_the_loss_step_of_trl_beside_ours(bench, monkeypatch):
    pytest.importorskip("trl", reason="trl is not installed (make test installs it)")
    for name, small in {"VOCAB": 64, "WIDTH": 32, "TOKENS": 8, "TURNS": 1}.items():
        monkeypatch.setattr(trl_step, name, small)
    result = bench("--op", "trl")
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^ (TRL|tokenrl, [a-z-]+), (100|50)% of 8 x 8 tokens  .*$", result.output, re.M)) == 6
