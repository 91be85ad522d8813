"""How Sphinx builds the user guide."""

from __future__ import annotations

import re
from pathlib import Path

_text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
_version = re.search(r'^version = "(.+)"$', _text, re.MULTILINE)
assert _version is not None

project = "llm_datadist"
version = release = _version.group(1)
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"llm_datadist {version}"

# Docstrings are in NumPy style; their sections become fields of the signature.
napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
default_role = "code"
