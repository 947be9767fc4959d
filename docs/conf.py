"""How the documentation is built: `sphinx-build -n -W docs OUT`, without a network."""

import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import pytree2safetensors
from pytree2safetensors._version import __version__

project = "pytree2safetensors"
copyright = "the authors of pytree2safetensors"  # noqa: A001 - Sphinx's name
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "generated",
]
exclude_patterns = ["_build", "benchmarks"]  # the benchmarks' tables are included in pages
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"pytree2safetensors {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "default"
pygments_dark_style = "monokai"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80

# Doctests of docstrings use the package and JAX without importing them again and again, and write
# files into a folder that goes away.
doctest_global_setup = """
import os
import tempfile
import jax
import numpy as np
from pytree2safetensors import *
from pytree2safetensors.testing import *
_before = os.getcwd()
_folder = tempfile.TemporaryDirectory()
os.chdir(_folder.name)
"""
doctest_global_cleanup = """
os.chdir(_before)
_folder.cleanup()
"""

# The pages link to no other project's inventory, so that a build needs no network; what follows are
# names in signatures that live in other projects.
nitpick_ignore_regex = [
    ("py:.*", r"pytree2safetensors\._.*"),  # private protocols and aliases that signatures mention
    (
        "py:.*",
        r"(jax|jaxlib|jaxtyping|numpy|np|hypothesis|safetensors|beartype)(\..*)?",
    ),  # third parties
    ("py:.*", r"(collections|concurrent|os|io|typing|pathlib)\..*"),  # the standard library
    ("py:.*", r"(PyTree|SearchStrategy|Array|ArrayLike|Path|BinaryIO|IO|PathLike|Future)(\[.*)?"),
    ("py:.*", r"(Any|Callable|Iterable|Iterator|Mapping|Sequence|Literal|None|TypeAlias)"),
    ("py:.*", r"(str|int|bool|bytes|float|dict|list|tuple|object|type|property)"),
    ("py:exc", r"(ValueError|TypeError|OSError|Exception|ImportError|KeyError|AttributeError)"),
]


def mark_up(*event: Any) -> None:
    """Turn the docstrings' plain marks into links and literals.

    Docstrings are read in editors more often than here, so they say `name` and no more.
    """
    lines: list[str] = event[-1]
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            linked = re.sub(r"^Specification: \*(.+)\*\.$", _section, line)
            lines[i] = re.sub(r"(?<![`:\w>])`([^`]+)`(?!`)(\w?)", _marked, linked)


def _section(found: re.Match[str]) -> str:
    page = "guarantees" if found[1] == "Laws" else "specification"
    return f"Specification: :doc:`{found[1]} <{page}>`."


def _marked(found: re.Match[str]) -> str:
    text, after = found.groups()
    public = text in pytree2safetensors.__all__
    marked = f":py:obj:`~pytree2safetensors.{text}`" if public else f"``{text}``"
    return f"{marked}\\ {after}" if after else marked


def setup(app: Sphinx) -> None:
    """Connect what this file defines."""
    app.connect("autodoc-process-docstring", mark_up)
