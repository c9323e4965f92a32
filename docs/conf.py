"""How Sphinx builds these documents: ``make docs``."""

from __future__ import annotations

project = "memplan"
copyright = "memplan's authors, Apache-2.0"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "memplan"
html_show_sphinx = False
myst_heading_anchors = 3
myst_links_external_new_tab = True
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository: tests/test_docs.py follows them
