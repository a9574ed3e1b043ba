"""`make gpu` on a machine without a GPU: what it would run is there, and each of its calls is within ten minutes."""

import json
import os
import re
import shlex
import subprocess

import pytest
from paths import ROOT
from typer.testing import CliRunner

from bench import __main__ as bench

LIMIT = 600  # seconds that a command on a lent machine may run
LINE = re.compile(r"(\d+) s > (\S+): (.*)")


def dry_run(*names: str):
    command = ["bash", "bench/gpu.sh", "--dry-run", *names]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHON": "python"}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def calls() -> dict[str, list[tuple[int, str, list[str]]]]:
    """Of each call: seconds, log and words of its commands."""
    done = dry_run()
    assert done.returncode == 0 and not done.stderr, done.stderr
    found: dict[str, list[tuple[int, str, list[str]]]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("call "):
            commands = found.setdefault(line.removeprefix("call "), [])
        else:
            seconds, log, command = LINE.fullmatch(line).groups()
            commands.append((int(seconds), log, shlex.split(command)))
    return found


def test_three_calls_of_less_than_ten_minutes(calls):
    limits = {name: sum(seconds for seconds, _, _ in commands) for name, commands in calls.items()}
    assert list(limits) == ["tests", "sanitizer", "speed"] and max(limits.values()) < LIMIT, limits
    logs = [log for commands in calls.values() for _, log, _ in commands]
    assert len(set(logs)) == len(logs), "a log would be overwritten"


def test_one_call_is_what_it_is_among_all(calls):
    assert dry_run("sanitizer").stdout.count("compute-sanitizer") == len(calls["sanitizer"])
    refused = dry_run("nonsense")
    assert refused.returncode == 2 and "accepted: tests, sanitizer, speed" in refused.stderr


def test_the_files_of_tests_are_there(calls):
    named = [word for _, _, words in calls["tests"] for word in words if word.startswith("tests/")]
    assert len(named) >= 2 * 7 and all((ROOT / name).exists() for name in named)


def options_of_bench(words: list[str]) -> list[str]:
    return words[words.index("bench") + 1 :] if "bench" in words else []


def test_the_options_of_bench_are_its_own(calls):
    """All but the device are accepted here: asked for a GPU, it gets as far as saying that there is none."""
    everything = [options_of_bench(words) for commands in calls.values() for _, _, words in commands]
    asked = [options for options in everything if options]
    assert len(asked) == len(calls["sanitizer"]) + 1
    for options in {tuple(options) for options in asked}:
        result = CliRunner().invoke(bench.app, list(options), env={"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""})
        assert result.exit_code == 2 and "torch sees no GPU here" in result.output, result.output


def test_a_line_is_there_as_soon_as_its_case_is_done(tmp_path, monkeypatch):
    """And stays, when a later case never ends."""
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: "malloc as it is")
    file, made = tmp_path / "cpu.jsonl", bench.make

    def second_stops(spec, place):
        if file.exists():
            raise KeyboardInterrupt
        return made(spec, place)

    monkeypatch.setattr(bench, "make", second_stops)
    few = ["--shape", "8x64", "--shape", "8x96", "--op", "token_logprobs", "--dtype", "fp32", "--repeats", "1"]
    given = ["--device", "cpu", "--no-compile", "--lines", str(file), *few]
    result = CliRunner().invoke(bench.app, given, env={"COLUMNS": "120"})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert result.exit_code != 0 and lines and {tuple(line["shape"]) for line in lines} == {(8, 64)}, result.output
