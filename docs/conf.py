"""The configuration of the documentation: `sphinx-build -n -W docs OUT` builds it, without a network."""

import os
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
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxext.opengraph",
    "generated",
]
exclude_patterns = ["_build", "benchmarks"]  # the benchmarks' tables are included in pages
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

SITE = "https://pytree2safetensors.readthedocs.io/en/latest/"
REPOSITORY = "https://github.com/cooljoseph1/pytree2safetensors/"
html_theme = "furo"
html_title = f"pytree2safetensors {release}"
html_baseurl = SITE
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_js_files = ["accessible.js"]
html_copy_source = False
html_theme_options = {
    "navigation_with_keys": True,
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [
        {
            "name": "GitHub",
            "url": REPOSITORY,
            "html": '<svg viewBox="0 0 16 16" fill="currentColor" stroke-width="0"><path d="M8 0C3.58 0'
            " 0 3.58 0 8c0 3.54 2.29 6.53 5.47 7.59.4.07.55-.17.55-.38 0-.19-.01-.82-.01-1.49-2.01.37"
            "-2.53-.49-2.69-.94-.09-.23-.48-.94-.82-1.13-.28-.15-.68-.52-.01-.53.63-.01 1.08.58 1.23"
            ".82.72 1.21 1.87.87 2.33.66.07-.52.28-.87.51-1.07-1.78-.2-3.64-.89-3.64-3.95 0-.87.31"
            "-1.59.82-2.15-.08-.2-.36-1.02.08-2.12 0 0 .67-.21 2.2.82.64-.18 1.32-.27 2-.27s1.36.09 2"
            " .27c1.53-1.04 2.2-.82 2.2-.82.44 1.1.16 1.92.08 2.12.51.56.82 1.27.82 2.15 0 3.07-1.87"
            " 3.75-3.65 3.95.29.25.54.73.54 1.48 0 1.07-.01 1.93-.01 2.2 0 .21.15.46.55.38A8.01 8.01 0"
            ' 0 0 16 8c0-4.42-3.58-8-8-8z"/></svg>',
        }
    ],
}
pygments_style = "default"
pygments_dark_style = "monokai"

# The copied text of a session has no prompts and no output.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

ogp_site_url = SITE
ogp_site_name = "pytree2safetensors"
ogp_image = "_static/social-card.png"
ogp_image_alt = "Save any JAX pytree to safetensors and load it back"
ogp_social_cards = {"enable": False}

# Links into other projects need their inventories from the network, so only the hosted build has them.
if "READTHEDOCS" in os.environ:
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "safetensors": ("https://huggingface.co/docs/safetensors/main/en", None),
    }

# `tox -e links` checks links to other sites. Every build checks the links inside of this one.
linkcheck_ignore = [re.escape(SITE)]
# GitHub makes its anchors with scripts.
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]
linkcheck_rate_limit_timeout = 60

autodoc_mock_imports = ["orbax"]  # large, and needed for one module
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

# Names in signatures that live in other projects, and that a build without a network cannot resolve.
nitpick_ignore_regex = [
    ("py:.*", r"pytree2safetensors\._.*"),  # private protocols and aliases that signatures mention
    (
        "py:.*",
        r"(jax|jaxlib|jaxtyping|numpy|np|hypothesis|orbax|safetensors|beartype)(\..*)?",
    ),  # third parties
    ("py:.*", r"(collections|concurrent|os|io|typing|pathlib)\..*"),  # the standard library
    (
        "py:.*",
        r"(PyTree|Shardings|SearchStrategy|Array|ArrayLike|Path|BinaryIO|IO|PathLike|Future)(\[.*)?",
    ),
    ("py:.*", r"(Any|Callable|Iterable|Iterator|Mapping|Sequence|Literal|None|TypeAlias)"),
    ("py:.*", r"(str|int|bool|bytes|float|dict|list|tuple|object|type|property)"),
    ("py:exc", r"(ValueError|TypeError|OSError|Exception|ImportError|KeyError|AttributeError)"),
]


SECTION = r"\*([^*]+)\*"
PAGES = {  # of the specification, by section
    section: page
    for page in ("format", "interface")
    for section in re.findall(
        r"^## (.+)$", Path(__file__).with_name(f"{page}.md").read_text("utf-8"), re.MULTILINE
    )
}


def mark_up(*event: Any) -> None:
    """Turn the docstrings' plain marks into links and literals.

    Docstrings are read in editors more often than here, so they say `name` and no more.
    """
    lines: list[str] = event[-1]
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            found = re.fullmatch(r"Specification: (\*.+\*)\.", line)
            linked = f"Specification: {re.sub(SECTION, _section, found[1])}." if found else line
            lines[i] = re.sub(r"(?<![`:\w>])`([^`]+)`(?!`)(\w?)", _marked, linked)


def _section(found: re.Match[str]) -> str:
    page = "guarantees" if found[1] == "Laws" else PAGES[found[1]]
    return f":doc:`{found[1]} <{page}>`"


def _marked(found: re.Match[str]) -> str:
    text, after = found.groups()
    public = text in pytree2safetensors.__all__
    marked = f":py:obj:`~pytree2safetensors.{text}`" if public else f"``{text}``"
    return f"{marked}\\ {after}" if after else marked


def setup(app: Sphinx) -> None:
    """Connect what this file defines."""
    app.connect("autodoc-process-docstring", mark_up)
