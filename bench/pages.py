"""python -m bench.pages PAGE: renders the tables of bench/results/ between their markers of a page of docs/."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from . import ranks
from .report import distill_table, fused_table, markdown_table, overhead_table, plan_table, short_table, trl_table

RESULTS = Path(__file__).parent / "results"
# The markers' name -> the file of the results, and the table that is made of them.
TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {
    "bench": ("cpu.json", short_table),
    "trl": ("trl.json", lambda report: markdown_table(*trl_table(report))),
    "overhead": ("overhead.json", lambda report: markdown_table(*overhead_table(report))),
    "distill": ("distill.json", lambda report: markdown_table(*distill_table(report))),
    "fused": ("fused.json", lambda report: markdown_table(*fused_table(report))),
    "plan": ("plan.json", lambda report: markdown_table(*plan_table(report))),
    "heads": ("ranks.json", ranks.heads_table),
    "vocabularies": ("ranks.json", ranks.vocabularies_table),
    "worlds": ("ranks.json", ranks.worlds_table),
}
PAGES = {
    "docs/benchmarks/index.md": ("bench", "trl", "overhead"),
    "docs/benchmarks/distillation.md": ("distill",),
    "docs/benchmarks/fused.md": ("fused",),
    "docs/guides/plan.md": ("heads", "vocabularies", "worlds", "plan"),
}


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def table(name: str) -> str:
    """The table of that name, of the committed results."""
    file, made = TABLES[name]
    return made(json.loads((RESULTS / file).read_text()))


def between(text: str, name: str) -> str:
    """What stands between the markers; ValueError where they are missing."""
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file needs one line {begin} and, after it, one line {end}")
    return text.split(begin)[1].split(end)[0].strip("\n")


def rendered(text: str, name: str, table: str) -> str:
    """The text with the table between its markers."""
    between(text, name)
    begin, end = markers(name)
    return f"{text.split(begin)[0]}{begin}\n{table}\n{end}{text.split(end)[1]}"


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in PAGES:
        sys.exit(f"usage: python -m bench.pages {' or '.join(PAGES)}")
    path = Path(sys.argv[1])
    text = path.read_text()
    for name in PAGES[sys.argv[1]]:
        text = rendered(text, name, table(name))
    path.write_text(text)


if __name__ == "__main__":
    main()
