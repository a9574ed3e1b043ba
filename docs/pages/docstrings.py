"""The house's docstrings, plain text with indented formulas, as reStructuredText."""

import re
from collections.abc import Iterator
from typing import Any

# A line that begins with an argument's name, after the end of a sentence: the house puts one below the other.
ARGUMENT = re.compile(r"[a-z]\w*(?:(?:, | to )[a-z]\w*)*: ")
SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:")  # of Google's style, which napoleon reads
SPECIAL = re.compile(r"([\\*|]|(?<=\w)_(?!\w)|^(?=(?:[-+>]{2}|\.\.|:|\(?[A-Za-z]{1,5}[.)] )))")


def as_restructured_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Handler of autodoc-process-docstring."""
    lines[:] = list(_converted(lines))


def _converted(lines: list[str]) -> Iterator[str]:
    section = literal = False
    previous = ""
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            section = line.strip() in SECTIONS
        if not line:
            yield ""
        elif section:
            yield escaped(line)
        elif indented:
            if not literal:
                yield from ("", "::", "")
            literal = True
            yield line
        else:
            if literal or (previous.endswith(".") and ARGUMENT.match(line)):
                yield ""
            literal = False
            yield escaped(line)
        previous = line


def escaped(line: str) -> str:
    """The line with nothing that reStructuredText would take for markup but `names`, which become literals."""
    indent = line[: len(line) - len(line.lstrip())]
    parts = re.split(r"(`[^`]+`)", line.strip())
    return indent + "".join(f"`{part}`" if part[:1] == "`" else SPECIAL.sub(r"\\\1", part) for part in parts)
