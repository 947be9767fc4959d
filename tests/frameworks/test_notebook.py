"""Containers in IPython and Jupyter: shown by treescope if it is active, or else as text."""

import io
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest
import treescope
from IPython.core import interactiveshell
from IPython.lib import pretty

from pytree2safetensors import PyTreeContainer, UnkeyedContainer, load_abstract, save_pytree

Shell: Any = interactiveshell.InteractiveShell  # IPython types some of what it has
show: Any = pretty.pretty


def abstract() -> Any:
    """A tree with both containers, from the header of a file."""
    layer = PyTreeContainer({"w": jnp.ones((2, 3)), "inner": UnkeyedContainer([jnp.ones(4), 1])})
    file = io.BytesIO()
    save_pytree(PyTreeContainer({"layer": layer, "name": "adam"}), file)
    file.seek(0)
    return load_abstract(file)


@pytest.fixture
def shell() -> Iterator[Any]:
    """A shell of IPython, as notebooks run it."""
    yield Shell.instance()
    Shell.clear_instance()


def test_ipython_prints_text(shell: Any) -> None:
    tree = abstract()
    shown, _ = shell.display_formatter.format(tree)
    assert shown == {"text/plain": repr(tree)}
    assert show({"a": tree.layer}) == (
        "{'a': PyTreeContainer(inner=UnkeyedContainer([float32[4], 1]), w=float32[2,3])}"
    )


def test_attributes_named_as_hooks_of_notebooks_change_nothing(shell: Any) -> None:
    hooks = ["_repr_html_", "_repr_mimebundle_", "_ipython_display_", "__treescope_repr__"]
    container = PyTreeContainer({hook: jnp.ones(2) for hook in hooks})
    shown, _ = shell.display_formatter.format(container)
    assert shown == {"text/plain": repr(container)}
    assert treescope.render_to_text(container).startswith("PyTreeContainer({")


def test_treescope_renders_attributes_with_their_paths() -> None:
    text = treescope.render_to_text(abstract())
    assert text.startswith(
        "PyTreeContainer(\n  layer=PyTreeContainer(\n    inner=UnkeyedContainer(["
    )
    assert "name='adam'" in text
    assert "w=ShapeDtypeStruct(shape=(2, 3)" in text


def test_treescope_renders_other_names_as_items() -> None:
    text = treescope.render_to_text(PyTreeContainer({"a.b": 1, "__class__": 2}))
    assert text == "PyTreeContainer({'__class__': 2, 'a.b': 1})"


def test_treescope_makes_html() -> None:
    assert "<" in treescope.render_to_html(abstract())
