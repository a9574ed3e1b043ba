"""What was measured as tables, in markdown, and as JSON."""

import json
from pathlib import Path

from .overhead import AIMS

MISSING = "-"
SPEED = (
    "op", "shape", "dtype", "backend", "forward ms", "fwd+bwd ms", "MB moved", "forward GB/s", "fwd+bwd GB/s",
    "forward % of limit", "fwd+bwd % of limit", "forward peak MB", "fwd+bwd peak MB", "value error", "gradient error",
)  # fmt: skip
LINEAR = (
    "op", "shape", "dtype", "backend", "forward ms", "fwd+bwd ms", "forward GFLOP/s", "fwd+bwd GFLOP/s",
    "x bare GEMMs", "% of limit", "forward peak MB", "fwd+bwd peak MB", "value error", "gradient error",
)  # fmt: skip
COUNTS = (
    "op", "shape", "backend", "bytes/token of the model", "bytes/token a copy could move in the time", "{launches}",
    "host syncs",
)  # fmt: skip
SHORT = (
    "op", "shape", "dtype", "backend", "forward ms", "fwd+bwd ms", "% of limit", "x bare GEMMs", "peak MB", "vs eager",
    "vs compile", "vs TRL", "vs Liger",
)  # fmt: skip
REMARKS = "Not measured, and remarks"
NOTES = (
    "MB moved: by the ideal kernel, forward plus backward. % of limit: the least time of the ideal kernel over the "
    "time taken; the least time is the larger of bytes over bandwidth (read, or copy where something is written, of a "
    "buffer of the case's size) and exponentials over their rate, and is named. Peak: what is allocated beyond the "
    "inputs, results included. Errors: L2, over those of the reference in the same precision, both against fp64."
)
LINEAR_NOTES = (
    "From hidden states: the limit is the bare GEMMs, torch.mm of the same shape and dtype into memory that is there, "
    "in turns with everything else: 1 forward; with the backward 4 of linear_token_logprobs, which computes the logits "
    "twice, and 3 of linear_policy_loss. x bare GEMMs: time over theirs, of all tokens, forward / forward+backward. % "
    "of limit and GFLOP/s count the GEMMs of active tokens only. linear_policy_loss computes its gradients in the "
    "forward, so its forward is timed under no_grad, for all. Errors are those of a case of 64 tokens, built alike."
)


def number(x: float | None, digits: int = 3) -> str:
    if x is None:
        return MISSING
    return f"{x:,.0f}" if abs(x) >= 10 ** (digits - 1) else f"{x:#.{digits}g}".rstrip(".") if x else "0"


def megabytes(x: int | None) -> str:
    return "<0.01" if x is not None and x < 1e4 else number(None if x is None else x / 1e6)


def times(pair: list[float | None] | None) -> str:
    """Forward / forward plus backward, as multiples."""
    return MISSING if pair is None else " / ".join(MISSING if x is None else f"{number(x)}x" for x in pair)


def percent(line: dict, key: str) -> str:
    share = line[f"{key}_percent"]
    return MISSING if share is None else f"{share:.1f} {line[f'{key}_limit']}"


def op_name(line: dict) -> str:
    return ", ".join(filter(None, (line["op"], line.get("variant"))))


def is_linear(line: dict) -> bool:
    """Whether its limit is the bare GEMMs."""
    return "both_over_gemms" in line


def over_gemms(line: dict) -> str:
    return times([line["forward_over_gemms"], line["both_over_gemms"]]) if is_linear(line) else MISSING


def linear_rows(lines: list[dict]) -> list[list[str]]:
    """As speed_rows, of the ops that start from hidden states."""
    return [
        [
            op_name(line), str(line["shape"]), line["dtype"], line["backend"], number(line["forward_ms"]),
            number(line["both_ms"]), number(line["forward_gflops"]), number(line["both_gflops"]), over_gemms(line),
            " / ".join(number(line[f"{key}_percent"]) for key in ("forward", "both")),
            megabytes(line["forward_peak_bytes"]), megabytes(line["both_peak_bytes"]),
            number(line["value_error_ratio"]), number(line["gradient_error_ratio"]),
        ]
        for line in lines
    ]  # fmt: skip


def speed_rows(lines: list[dict]) -> list[list[str]]:
    """A row per case and backend, competitors included."""
    return [
        [
            op_name(line), str(line["shape"]), line["dtype"], line["backend"], number(line["forward_ms"]),
            number(line["both_ms"]), megabytes(line["both_bytes"]), number(line["forward_gbps"]),
            number(line["both_gbps"]), percent(line, "forward"), percent(line, "both"),
            megabytes(line["forward_peak_bytes"]), megabytes(line["both_peak_bytes"]),
            number(line["value_error_ratio"]), number(line["gradient_error_ratio"]),
        ]
        for line in lines
    ]  # fmt: skip


def ratio_table(lines: list[dict]) -> tuple[list[str], list[list[str]]]:
    """How many times as fast our backends are as each competitor."""
    ours = [line for line in lines if line["ours"]]
    rivals = list(dict.fromkeys(name for line in ours for name in line["versus"]))
    keys = ("shape", "dtype", "backend")
    rows = [
        [op_name(line), *(str(line[key]) for key in keys), *(times(line["versus"].get(r)) for r in rivals)]
        for line in ours
    ]
    return ["op", *keys, *(f"vs {r}" for r in rivals)], rows


def count_rows(lines: list[dict]) -> list[list[str]]:
    return [
        [
            line["op"], str(line["shape"]), line["backend"], number(line["model_bytes_per_token"]),
            number(line["time_as_bytes_per_token"]),
            MISSING if line["launches"] is None else str(line["launches"]),
            "n/a" if line["host_syncs"] is None else str(line["host_syncs"]),
        ]
        for line in lines if "launches" in line
    ]  # fmt: skip


def overhead_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """What each call costs beside its kernels, and what it is held to."""
    found = report.get("overhead", {})
    return ["call", "additions", "aim"], [[name, f"{x:.0f}", str(AIMS[name] or MISSING)] for name, x in found.items()]


def cliffs_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """What is asked of the kernels beside its plain neighbour."""
    rows = [[x["name"], x["neighbour"], f"{x['ratio']:.2f}", number(x["aim"])] for x in report.get("cliffs", [])]
    return ["call", "neighbour", "times its time", "at most"], rows


def fused_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """A gate that tokenrl.fuse made beside the built-in one, and beside autograd's derivative of its torch."""
    rows = [
        [name, *(number(times[way]) for way in ("built in", "fused", "reference")),
         f"{times['fused'] / times['built in']:.2f}"]
        for name, times in report.get("fused", {}).items()
    ]  # fmt: skip
    return ["gate of", "built in, ns a token", "fused", "reference", "fused / built in"], rows


def trl_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """TRL's loss step and ours in turns, ours below TRL's."""
    rows, theirs = [], {}
    for step in report.get("trl", []):
        theirs = step if step["what"].startswith("TRL") else theirs
        ratios = [MISSING if step is theirs else f"{theirs[key] / step[key]:.1f}x" for key in ("seconds", "bytes")]
        rows.append([step["what"], number(1e3 * step["seconds"]), megabytes(step["bytes"]), *ratios])
    return ["loss step", "ms", "peak MB", "faster", "smaller"], rows


def distill_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """A student's loss step each way, beside its bare GEMMs and ours."""
    found = report.get("distill", [])
    base = {(row["what"], row["way"]): row["seconds"] for row in found}
    rows = []
    for row in found:
        gemms, ours = (base[row["what"], way] for way in ("bare GEMMs", "tokenrl"))
        faster = MISSING if row["way"] in ("bare GEMMs", "tokenrl") else f"{row['seconds'] / ours:.1f}x"
        rows.append([
            row["what"], row["way"], number(1e3 * row["seconds"]), f"{row['seconds'] / gemms:.2f}x",
            megabytes(row["bytes"]), faster,
        ])  # fmt: skip
    return ["loss step", "way", "ms", "bare GEMMs", "peak MB", "tokenrl is"], rows


def plan_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """What the plan said, and what it was."""
    rows = []
    for row in report.get("plan", []):
        seconds, size = (row[f"planned_{key}"] / row[key] for key in ("seconds", "bytes"))
        rows.append([
            f"{row['shape']} {row['dtype']}, {row['budget'] >> 20} MiB", row["way"],
            number(1e3 * row["planned_seconds"]), number(1e3 * row["seconds"]), f"{seconds:.2f}",
            megabytes(row["planned_bytes"]), megabytes(row["bytes"]), f"{size:.2f}",
        ])  # fmt: skip
    return ["head, budget", "way", "plan ms", "ms", "ratio", "plan MB", "MB", "ratio"], rows


def tables(report: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of each table that has rows."""
    lines = report["lines"]
    linear, rest = [x for x in lines if is_linear(x)], [x for x in lines if not is_linear(x)]
    what = "kernel launches" if report["device"] == "cuda" else "ops dispatched"
    found = [
        ("Host side of a call, in additions of a 64 x 8 tensor", *overhead_table(report)),
        ("Beside a plain neighbour, one thread", *cliffs_table(report)),
        ("Fused gates, forward and backward, one thread", *fused_table(report)),
        ("The loss step of TRL's GRPOTrainer", *trl_table(report)),
        ("A student's loss step, from hidden states", *distill_table(report)),
        ("tokenrl plan of this CPU, one thread, beside what it takes", *plan_table(report)),
        ("Speed, memory, errors", list(SPEED), speed_rows(rest)),
        ("From hidden states: speed, memory, errors", list(LINEAR), linear_rows(linear)),
        ("Times as fast as, forward / forward+backward", *ratio_table(lines)),
        ("Objectives, forward and backward", [h.format(launches=what) for h in COUNTS], count_rows(lines)),
        (
            REMARKS, ["case", "competitor", "reason"],
            [[m["case"], m["competitor"], m["reason"]] for m in report["missing"]],
        ),
    ]  # fmt: skip
    return [table for table in found if table[2]]


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def notes(report: dict) -> list[str]:
    lines = report["lines"]
    return [NOTES] * bool(lines) + [LINEAR_NOTES] * any(map(is_linear, lines))


def markdown(report: dict) -> str:
    """The whole report."""
    parts = [f"**{title}**\n\n{markdown_table(head, rows)}" for title, head, rows in tables(report)]
    return "\n\n".join([report["machine"], *parts, *notes(report), *report["failures"]]) + "\n"


def short_table(report: dict) -> str:
    """The short table of docs/benchmarks: our backends only, forward+backward where one number stands for both."""
    rows = [
        [
            op_name(line), str(line["shape"]), line["dtype"], line["backend"], number(line["forward_ms"]),
            number(line["both_ms"]), percent(line, "both"), over_gemms(line), megabytes(line["both_peak_bytes"]),
            *(times(line["versus"].get(rival)) for rival in ("eager", "compile", "TRL", "Liger")),
        ]
        for line in report["lines"] if line["ours"]
    ]  # fmt: skip
    return markdown_table(list(SHORT), rows)


def add_lines(lines: list[dict], file: Path) -> None:
    """What was measured so far stays where a run is ended by its limit."""
    with file.open("a") as out:
        out.writelines(f"{json.dumps(line)}\n" for line in lines)


def write_json(report: dict, path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n")


def write_folder(report: dict, folder: Path) -> None:
    """{device}.md, {device}.json and {device}.png."""
    from .figure import draw

    folder.mkdir(parents=True, exist_ok=True)
    device = report["device"]
    (folder / f"{device}.md").write_text(markdown(report))
    write_json(report, folder / f"{device}.json")
    draw(report, folder / f"{device}.png")
