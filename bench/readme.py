"""python -m bench.readme README.md: renders bench/results/cpu.json between the markers of a README."""

import json
import sys
from pathlib import Path

from .report import readme_table

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
RESULTS = Path(__file__).parent / "results" / "cpu.json"


def between(text: str) -> str:
    """What stands between the markers; ValueError where they are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file needs one line {BEGIN} and, after it, one line {END}")
    return text.split(BEGIN)[1].split(END)[0].strip("\n")


def rendered(text: str, report: dict) -> str:
    """The text with the table of the report between its markers."""
    between(text)
    return f"{text.split(BEGIN)[0]}{BEGIN}\n{readme_table(report)}\n{END}{text.split(END)[1]}"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.readme README.md")
    path = Path(sys.argv[1])
    path.write_text(rendered(path.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
