"""What was measured as tables: for a terminal, in markdown, as JSON."""

import json
import sys
from pathlib import Path

MISSING = "-"
SPEED = (
    "op", "shape", "dtype", "backend", "forward ms", "fwd+bwd ms", "MB moved", "forward GB/s", "fwd+bwd GB/s",
    "forward % of limit", "fwd+bwd % of limit", "forward peak MB", "fwd+bwd peak MB", "value error", "gradient error",
)  # fmt: skip
COUNTS = (
    "op", "shape", "backend", "bytes/token of the model", "bytes/token a copy could move in the time", "{launches}",
    "host syncs",
)  # fmt: skip
README = (
    "op", "shape", "dtype", "backend", "forward ms", "fwd+bwd ms", "% of limit", "peak MB", "vs eager", "vs compile",
    "vs TRL",
)  # fmt: skip
HEADS = (
    "op", "shape", "dtype", "backend", "forward ms", "fwd+bwd ms", "over bare GEMMs", "GFLOP/s", "peak MB",
    "value / gradient error", "vs eager", "vs TRL", "vs Liger",
)  # fmt: skip
HEAD_NOTES = (
    "From hidden states: pairs are forward / forward+backward. Over bare GEMMs: time over that of the bare GEMMs of "
    "the whole shape into memory that is there: one forward, with the backward four (linear_token_logprobs) or three "
    "(linear_policy_loss). Correctness is checked on 64 rows of the same head. Liger's loss is its grpo, ours and "
    "TRL's ctpo."
)
NOTES = (
    "MB moved: by the ideal kernel, forward plus backward. % of limit: the least time of the ideal kernel over the "
    "time taken; the least time is the larger of bytes over bandwidth (read, or copy where something is written, of a "
    "buffer of the case's size) and exponentials over their rate, and is named. Peak: what is allocated beyond the "
    "inputs, results included. Errors: L2, over those of the reference in the same precision, both against fp64."
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


def speed_rows(lines: list[dict]) -> list[list[str]]:
    """A row per case and backend, competitors included."""
    return [
        [
            line["op"], str(line["shape"]), line["dtype"], line["backend"], number(line["forward_ms"]),
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
    keys = ("op", "shape", "dtype", "backend")
    rows = [[*(str(line[key]) for key in keys), *(times(line["versus"].get(r)) for r in rivals)] for line in ours]
    return [*keys, *(f"vs {r}" for r in rivals)], rows


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


def pair(line: dict, key: str) -> str:
    return " / ".join(number(line[f"{when}_{key}"]) for when in ("forward", "both"))


def head_rows(lines: list[dict]) -> list[list[str]]:
    """A row per case and backend of the ops from hidden states; rivals and bare GEMMs included."""
    return [
        [
            f"{line['op']} {line['variant']}".strip(), str(line["shape"]), line["dtype"], line["backend"],
            number(line["forward_ms"]), number(line["both_ms"]), pair(line, "over_gemms"), pair(line, "gflops"),
            " / ".join(map(megabytes, line["peak_bytes"])) if line["peak_bytes"] else MISSING,
            " / ".join(map(number, line["errors"])) if line["errors"] else MISSING,
            *(times(line.get("versus", {}).get(rival)) for rival in ("eager", "TRL", "Liger")),
        ]
        for line in lines
    ]  # fmt: skip


def tables(report: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of each table that has rows."""
    lines = report["lines"]
    what = "kernel launches" if report["device"] == "cuda" else "ops dispatched"
    found = [
        ("Speed, memory, errors", list(SPEED), speed_rows(lines)),
        ("Times as fast as, forward / forward+backward", *ratio_table(lines)),
        ("From hidden states", list(HEADS), head_rows(report.get("heads", []))),
        ("Objectives, forward and backward", [h.format(launches=what) for h in COUNTS], count_rows(lines)),
        (
            "Not measured", ["case", "competitor", "reason"],
            [[m["case"], m["competitor"], m["reason"]] for m in report["missing"]],
        ),
    ]  # fmt: skip
    return [table for table in found if table[2]]


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def markdown(report: dict) -> str:
    """The whole report."""
    parts = [f"**{title}**\n\n{markdown_table(head, rows)}" for title, head, rows in tables(report)]
    notes = [NOTES, HEAD_NOTES] if report.get("heads") else [NOTES]
    return "\n\n".join([report["machine"], *parts, *notes, *report["failures"]]) + "\n"


def show(report: dict) -> None:
    """On a terminal as wide tables, elsewhere as markdown."""
    if not sys.stdout.isatty():
        print(markdown(report))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(report["machine"], highlight=False)
    for title, head, rows in tables(report):
        table = Table(title=title, title_justify="left", header_style="bold")
        for name in head:
            table.add_column(name, justify="left" if head.index(name) < 4 or title == "Not measured" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(NOTES, style="dim", highlight=False)


def readme_table(report: dict) -> str:
    """The short table of the README: our backends only, forward+backward where one number stands for both."""
    rows = [
        [
            line["op"], str(line["shape"]), line["dtype"], line["backend"], number(line["forward_ms"]),
            number(line["both_ms"]), percent(line, "both"), megabytes(line["both_peak_bytes"]),
            *(times(line["versus"].get(rival)) for rival in ("eager", "compile", "TRL")),
        ]
        for line in report["lines"] if line["ours"]
    ]  # fmt: skip
    short = markdown_table(list(README), rows)
    linear = head_rows([line for line in report.get("heads", []) if line["ours"]])
    return f"{short}\n\n{markdown_table(list(HEADS), linear)}" if linear else short


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
