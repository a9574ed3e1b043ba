"""Sphinx builds docs/ by this: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for the extension `pages`

project = "tokenrl"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "pages"]
exclude_patterns = ["_build", "pages"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "tokenrl"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_copyright = False
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"
autodoc_member_order = "bysource"
highlight_language = "none"
smartquotes = False
autosummary_generate = False
napoleon_numpy_docstring = False
nitpicky = True
# Only names of the public face have a page: torch's, Python's, and types of rooms are told as they are written.
nitpick_ignore_regex = [("py:(class|obj|data|attr|exc|func|meth)", r".*")]
