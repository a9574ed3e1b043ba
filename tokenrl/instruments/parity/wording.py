"""A report in words and as JSON."""

import dataclasses
import json
import math
from typing import Any

from .comparison import Error, Token
from .gate_check import GateReport
from .report import Report


def token_words(token: Token) -> str:
    sign = "A > 0" if token.advantage > 0 else "A < 0" if token.advantage < 0 else "A = 0"
    edge = "no clip edge" if token.to_edge is None else f"{token.to_edge:+.3g} to the clip edge"
    where = f"sequence {token.sequence}, token {token.position} of {token.length}"
    return f"{where}, ratio {token.ratio:.5g}, {sign}, {edge}"


def error_words(error: Error) -> str:
    what = "value" if error.of == "loss" else f"gradient by {error.of}"
    return f"{what}: {error.norm} error {error.error:.2e}, allowed {error.allowed:.2e}"


def words(report: Report) -> str:
    """What does not hold, a line each, and where."""
    lines = []
    for comparison in report.comparisons:
        if comparison.held:
            continue
        lines.append(f"{comparison.way} is not {report.objective!r} in {comparison.dtype}")
        lines += [f"  {error_words(error)}" for error in comparison.errors if not error.held]
        if comparison.worst is not None:
            lines.append(f"  most at {token_words(comparison.worst)}")
    return "\n".join([*lines, *(f"  {line}" for line in mistake_words(report))])


def mistake_words(report: Report) -> list[str]:
    """What a wrong loss computes, if that is known."""
    if report.mistakes is None:
        return []
    if not report.mistakes:
        return ["its numbers are those of no usual mistake"]
    return ["its numbers are those of", *(f"  {name}" for name in report.mistakes)]


def as_json(report: Report | GateReport) -> str:
    return json.dumps(_plain(report), indent=2)


def _plain(x: Any) -> Any:
    """Dataclasses with what they say of themselves; JSON has no infinity."""
    if dataclasses.is_dataclass(x):
        known = {field.name: _plain(getattr(x, field.name)) for field in dataclasses.fields(x)}
        return known | ({"held": x.held} if hasattr(x, "held") else {})
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
