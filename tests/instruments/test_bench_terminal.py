"""The benchmark's tables on a terminal of 80 columns."""

import io
import json

from rich.console import Console

from bench import pages, terminal
from bench.report import plan_table


def committed() -> dict:
    """Everything that is committed, as one report."""
    report = json.loads((pages.RESULTS / "cpu.json").read_text())
    for name in ("overhead", "trl", "cliffs", "fused", "distill", "plan"):
        report[name] = json.loads((pages.RESULTS / f"{name}.json").read_text())[name]
    return report


def printed(report: dict) -> str:
    console = Console(file=io.StringIO(), width=80)
    terminal.show(report, console)
    return console.file.getvalue()


def test_no_number_is_cut_or_wrapped():
    report = committed()
    lines = printed(report).splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    rows = [" ".join(line.split()) for line in lines]
    found = [(head, row) for _, (head, table), _ in terminal.tables(report) for row in table]
    assert len(found) > len(report["lines"]) + len(report["plan"])
    for head, row in found:
        numbers = " ".join(row[2:] if head[0] == "call" and len(row) == 4 else row[1:])  # two columns of words
        assert any(line.endswith(numbers) for line in rows), row


def test_every_case_and_remark_is_there():
    report = committed()
    text = " ".join(printed(report).split())
    for line in report["lines"]:
        assert f"{terminal.op_name(line)} {line['shape']} {line['dtype']}" in text
    for one in report["missing"]:
        assert one["case"] in text and f"{one['competitor']}: {one['reason']}" in text
    assert all(row[0] in text for row in plan_table(report)[1])


def test_a_competitor_says_how_much_faster_ours_is():
    line = next(x for x in committed()["lines"] if x["ours"] and x["versus"].get("eager"))
    rival = next(x for x in committed()["lines"] if x["backend"] == "eager" and x["shape"] == line["shape"])
    head, rows = terminal.case_table([line, rival])
    assert head[-1] == "ours is" and rows[0][-1] == "-"
    forward, both = (float(x.rstrip("x")) for x in rows[1][-1].split("/"))
    assert abs(forward / line["versus"]["eager"][0] - 1) < 0.01 and abs(both / line["versus"]["eager"][1] - 1) < 0.01
