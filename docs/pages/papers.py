"""Which paper is which row: the methods of docs/papers.toml, then every other paper that a table names."""

from pathlib import Path
from typing import Any

from tokenrl.instruments.catalogue import entries, find_entry

from .rows import anchor, fenced, linked, page

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where Sphinx needs tomli
    import tomli as tomllib

METHODS: list[dict[str, Any]] = tomllib.loads((Path(__file__).parents[1] / "papers.toml").read_text())["method"]


def of_methods(_: str) -> str:
    return "\n\n".join(section(method) for method in METHODS)


def section(method: dict[str, Any]) -> str:
    papers = f" arXiv {', '.join(linked(number) for number in method['papers'])}." if method["papers"] else ""
    fed = ", ".join(call(name) for name in method.get("fed", ()))
    rows = ", ".join(row_link(name) for name in method["rows"]) or "any"
    example = method.get("example", "").strip() or find_entry(method["rows"][0]).example
    lines = [f"- Row: {rows}"] + [f"- Fed with: {fed}"] * bool(fed)
    return "\n\n".join(
        [f"## {method['name']}", f"{method['said']}{papers}", "\n".join(lines), fenced("python", example)]
    )


def call(name: str) -> str:
    return f"{{py:func}}`~tokenrl.{name}`"


def row_link(name: str) -> str:
    return f"[`{name}`](objectives/{page(find_entry(name).family)}.md#{anchor(name)})"


def of_others(_: str) -> str:
    """Papers whose method is a row and needs nothing else."""
    shown = {number for method in METHODS for number in method["papers"]}
    found: dict[str, list[str]] = {}
    for entry in entries():
        for number in entry.papers:
            if number not in shown and entry.table != "divergence":
                found.setdefault(number, []).append(row_link(entry.name))
    lines = [f"| {linked(number)} | {', '.join(rows)} |" for number, rows in sorted(found.items())]
    return "\n".join(["| arXiv | row |", "| --- | --- |", *lines])
