"""Sphinx settings. Build: sphinx-build -W docs build/docs (offline; a warning is an error)."""

from __future__ import annotations

from importlib.metadata import version as installed

project = "qualiclip-pyiqa"
copyright = "the authors of qualiclip-pyiqa"
release = installed("qualiclip-pyiqa")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"qualiclip-pyiqa {release}"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# The repository's own links to files beside docs/, such as ../README.md, are for whoever reads them there.
suppress_warnings = ["myst.xref_missing"]
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_custom_sections = [("Shape", "notes_style"), ("Convention", "notes_style")]
nitpicky = False
