"""The results under bench/results, which `tokenrl plan` shows beside its prediction."""

import json
from pathlib import Path
from typing import Any

from tokenrl.instruments.plan.gpus import GPUS
from tokenrl.instruments.plan.model import Shape

RESULTS = Path(__file__).parent / "results"
# (op, variant, whether it is ours or eager's) -> the way of the plan.
WAYS = {
    ("linear_policy_loss", "all active", "eager"): "eager",
    ("linear_policy_loss", "all active", "ours"): "linear_policy_loss",
    ("linear_token_logprobs", "", "ours"): "linear_token_logprobs",
}


def committed(shape: Shape, gpu: str) -> dict[str, dict[str, Any]]:
    """Way -> seconds and bytes of forward and backward that were measured of this shape on such a machine, and where.

    gpu: a name of the plan's; of the table those results count whose machine bears its name."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        if _is_on(report, gpu):
            for name, row in _rows(report, shape):
                found[name] = row | {"machine": f"{report['machine'].split(';')[0]} ({path.name})"}
    return found


def _is_on(report: dict[str, Any], gpu: str) -> bool:
    if gpu not in GPUS:
        return report.get("device") == gpu
    return report.get("device") == "cuda" and GPUS[gpu].title.split()[0] in report["machine"].split(",")[0]


def _rows(report: dict[str, Any], shape: Shape) -> list[tuple[str, dict[str, Any]]]:
    dtype, sizes = str(shape.dtype).removeprefix("torch."), [shape.tokens, shape.hidden, shape.vocab]
    rows = []
    for line in report["lines"]:
        way = WAYS.get((line["op"], line["variant"], "ours" if line["ours"] else line["backend"]))
        if way and line["shape"] == sizes and line["dtype"] == dtype:
            rows.append((way, {"seconds": line["both_ms"] / 1e3, "bytes": line["both_peak_bytes"]}))
    return rows
