"""`tokenrl profile` on every kind of batch: right ways alone are timed, each with its reason where it is not."""

import functools
import json
import re

import pytest
import torch
from parity_batches import BATCHES, saved
from tokenrl.bench import recorded, recorded_report, recorded_ways
from typer.testing import CliRunner

import tokenrl
from tokenrl import cli
from tokenrl.instruments.parity import random_batch
from tokenrl.instruments.rollout_batch import save

pytestmark = pytest.mark.usefixtures("known_limits")
QUICK = ("--no-compile", "--repeats", "3")


@pytest.fixture(autouse=True)
def malloc_as_it_is(monkeypatch):
    monkeypatch.setattr(recorded_report, "keep_freed_memory", lambda: None)  # the other tests share this process


def called(*arguments: object, width: int = 80):
    return CliRunner().invoke(cli.application(), ["profile", *map(str, arguments)], env={"COLUMNS": str(width)})


def found(*arguments: object):
    outcome = called(*arguments, *QUICK, "--json")
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


@pytest.fixture
def hidden(tmp_path):
    """With a head of 16 bits, a bias, and a temperature."""
    batch, g = random_batch(2, "grpo", head="hidden"), torch.Generator().manual_seed(0)
    head = {name: batch.tensors[name].bfloat16() for name in ("hidden", "weight")}
    tensors = {**batch.tensors, **head, "bias": torch.randn(31, generator=g).bfloat16()}
    save(tokenrl.RolloutBatch(tensors, batch.objective, batch.settings, {}), tmp_path / "hidden")
    return tmp_path / "hidden"


OPS = {
    "demo-like": {"token_logprobs", "objective"}, "empty": {"token_logprobs", "objective"}, "long": {"objective"},
    "packed": {"linear_policy_loss"},
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_every_kind_of_batch(name, tmp_path):
    seen = found(saved(name, tmp_path))
    timed = {line["name"]: line for line in seen["beside"]}
    assert {"eager"} < set(timed) and seen["not_timed"]["compile"] == "--no-compile" and not seen["wrong"]
    assert all(line["seconds"] > 0 and line["samples"] == 3 and line["error_share"] <= 1 for line in timed.values())
    assert seen["beside"][0]["ours"] and seen["beside"][0]["times_ours"] == 1
    if name in ("demo-like", "packed", "empty"):
        assert "TRL" in timed or "trl" in seen["not_timed"]["TRL"]
    named = {op["what"].split()[0] for op in seen["profile"]["ops"] if op["shape"]}
    assert OPS[name] <= named or (name == "packed" and "linear_token_logprobs" in named)
    assert len(seen["ratios"]["position"]) == (
        0 if name == "empty" else 48 if name == "long" else 24 if name == "packed" else 22
    )


def test_from_hidden_states_both_ways_and_liger(hidden):
    seen = found(hidden)
    assert {"cpu, linear_policy_loss", "cpu, linear_token_logprobs"} <= {line["name"] for line in seen["beside"]}
    assert seen["batch"]["size"].endswith("hidden [8, 24, 12] bfloat16, weight [31, 12]")
    rest = seen["not_timed"].get("Liger", "")
    assert "Liger" in {line["name"] for line in seen["beside"]} or "tolerance rule" in rest or "installed" in rest
    assert "CTPO" not in rest and "ctpo" in found(hidden, "--objective", "ctpo")["not_timed"]["Liger"]


def test_the_table_has_80_columns(hidden, tmp_path):
    for batch in (hidden, saved("demo-like", tmp_path)):
        outcome = called(batch, *QUICK)
        assert outcome.exit_code == 0, outcome.output
        seen = outcome.output.splitlines()
        assert max(map(len, seen)) <= 80 and not any("…" in line for line in seen)
        for part in ("eager", "objective forward", "all else in the step", "instruction set" and "threads"):
            assert any(part in line for line in seen), part


def test_trace_page_and_backend(tmp_path):
    batch, trace, page = saved("demo-like", tmp_path), tmp_path / "trace.json", tmp_path / "report.html"
    seen = found(batch, "--backend", "reference", "--objective", "sapo", "--trace", trace, "--html", page)
    assert seen["batch"]["objective"] == "sapo" and seen["beside"][0]["name"].startswith("reference")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "tokenrl::objective forward [192] fp32 reference" in names
    assert "sapo on demo-like.safetensors: reference, token_logprobs" in page.read_text()


def test_torch_compile_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # C++ takes a minute
    outcome = called(saved("demo-like", tmp_path), "--repeats", "3", "--json")
    assert "compile" in {line["name"] for line in json.loads(outcome.stdout)["beside"]}


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    batch, right = saved("demo-like", tmp_path), recorded_ways.eager_scores
    monkeypatch.setattr(recorded_ways, "eager_scores", lambda batch, x: (right(batch, x)[0] * 1.01, None))
    seen = found(batch)
    assert "eager" not in {line["name"] for line in seen["beside"]}
    assert seen["not_timed"]["eager"].startswith("not within the tolerance rule: ")
    ours = recorded_ways.two_ops
    monkeypatch.setattr(recorded_ways, "two_ops", lambda *way: lambda x: ours(*way)(2 * x - x.detach()))
    outcome = called(batch, *QUICK, "--json")
    assert outcome.exit_code == 1
    seen = json.loads(outcome.stdout)
    assert seen["wrong"] == ["cpu, token_logprobs"] and seen["profile"] is None
    assert "logits" in seen["not_timed"]["cpu, token_logprobs"]
    assert called(batch, *QUICK).exit_code == 1


def test_tokens_that_rounding_decides_are_not_held_against_anybody():
    batch = random_batch(0, "grpo", temperature=1.0)
    logp = batch.log_probs("reference")
    old = logp - torch.log1p(torch.full_like(logp, 0.2))  # every ratio is the upper bound
    batch = tokenrl.RolloutBatch({**batch.tensors, "old_logp": old}, batch.objective, {}, {})
    held = recorded.held_batch(batch, batch.objective)
    upward = (batch.tensors["advantages"] > 0)[:, None] & batch.tensors["mask"]
    assert torch.equal(held.batch.tensors["token_weight"] == 0, upward)


def test_a_batch_too_large_to_be_held_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "MOST_LOGITS", 10)
    monkeypatch.setattr(recorded, "HELD_LOGITS", 5)
    seen = found(saved("demo-like", tmp_path))
    assert "held to no rule" in seen["not_timed"]["all"] and seen["beside"][0]["error_share"] is None


ERRORS = {
    "device": (["--device", "gpu"], "device: got 'gpu', accepted: cpu, cuda."),
    "backend": (["--backend", "tritn"], "backend: got 'tritn', accepted: cuda, .* Did you mean 'triton'"),
    "objective": (["--objective", "cptp"], "objective: got 'cptp', .* Did you mean 'ctpo'"),
    "unable": (["--backend", "cuda"], r"backend: got cuda, accepted: cpu, .*reference.* \(cuda: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS)
def test_what_is_not_there_is_named(kind, tmp_path):
    if kind == "unable" and torch.cuda.is_available():
        pytest.skip("the CUDA backend can run here")
    arguments, message = ERRORS[kind]
    refused(message, saved("demo-like", tmp_path), *arguments)


def refused(message: str, *arguments: object):
    """It ends with 1, by a line that matches."""
    outcome = called(*arguments)
    assert outcome.exit_code == 1 and re.search(f"^tokenrl profile: {message}", outcome.output)


def test_a_damaged_batch_is_named(tmp_path):
    path = saved("demo-like", tmp_path)
    path.write_bytes(path.read_bytes()[:300])
    refused(r"path: got .*damaged \(", path)
    refused(r".*nowhere", tmp_path / "nowhere")


def test_help_has_an_example():
    assert "Example: tokenrl profile batch.safetensors" in " ".join(called("--help", width=120).output.split())
