"""A Sphinx extension: what pages say of the tables and of the public names is written when they are built.

A page holds a comment, `<!-- rows: prefix -->`, where the text of that kind and of that argument comes in.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import compared, docstrings, papers, reference, rows

if TYPE_CHECKING:
    from sphinx.application import Sphinx

WRITTEN: dict[str, Callable[[str], str]] = {
    "reference": reference.of_room,
    "rows": rows.of_family,
    "families": rows.of_all,
    "aggregations": rows.of_aggregations,
    "advantages": rows.of_advantages,
    "pictured": compared.pictured,
    "gallery": rows.of_gallery,
    "methods": papers.of_methods,
    "papers": papers.of_others,
}
PLACE = re.compile(r"^<!-- ([a-z]+): ([\w-]+) -->$", re.M)


def written(page: str) -> str:
    """The Markdown of a page with what its comments stand for."""
    return PLACE.sub(lambda found: WRITTEN[found[1]](found[2]), page)


def _write(app: "Sphinx", name: str, content: list[str]) -> None:
    content[0] = written(content[0])


def setup(app: "Sphinx") -> dict[str, Any]:
    app.connect("source-read", _write)
    app.connect("autodoc-process-docstring", docstrings.as_restructured_text, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
