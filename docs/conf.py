"""Sphinx: Markdown pages, and a reference from the docstrings."""

import silbo

project = "silbo"
author = "the silbo authors"
copyright = "the silbo authors, Apache-2.0"  # noqa: A001  Sphinx's name
version = release = silbo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"silbo {release}"

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
