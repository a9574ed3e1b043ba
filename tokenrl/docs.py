"""The table of objectives as README shows it; `python -m tokenrl.docs README.md` writes it there."""

import re
import sys
from pathlib import Path

from .objectives import OBJECTIVES, Objective


def _parameters(row: Objective) -> str:
    values = {name: getattr(row.gate, name) for name in row.gate.names}
    if row.cap != float("inf"):
        values["cap"] = row.cap
    if row.clamp != 20:
        values["clamp"] = row.clamp
    return ", ".join(f"{name}={value}" for name, value in values.items())


def objectives_table() -> str:
    """Markdown, one line per row of OBJECTIVES."""
    head = "| name | statistic | flow | gate | parameters | aggregation | source |\n|---|---|---|---|---|---|---|"
    rows = (
        f"| `{r.name}` | {r.statistic} | {r.flow} | {r.gate.name} | {_parameters(r)} | {r.aggregation} | {r.source} |"
        for r in OBJECTIVES.values()
    )
    return "\n".join([head, *rows])


if __name__ == "__main__":
    path = Path(sys.argv[1])
    between = f"<!-- objectives -->\n{objectives_table()}\n<!-- /objectives -->"
    path.write_text(
        re.sub(r"<!-- objectives -->\n.*?<!-- /objectives -->", lambda _: between, path.read_text(), flags=re.S)
    )
