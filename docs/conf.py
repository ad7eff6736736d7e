"""The documentation site: `sphinx-build -W docs build/site`. Every warning is an error, a dead link or anchor is a warning."""

from __future__ import annotations

import sys
from pathlib import Path

import llama4_kernels

sys.path.insert(0, str(Path(__file__).parent))
import docstrings

project = "llama4_kernels"
version = release = llama4_kernels.__version__
html_title = f"{project} {release}"
copyright = "the authors of llama4_kernels, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_heading_anchors = 4
nitpicky = True
nitpick_ignore_regex = [("py:class", r"(torch\.)?(Tensor|dtype|device)|.*Iterator")]

autodoc_typehints = "signature"
maximum_signature_line_length = 100
add_module_names = False
python_display_short_literal_types = True
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False


def setup(app) -> None:
    app.connect("autodoc-process-docstring", docstrings.process)
