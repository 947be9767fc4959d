"""How trees print: shapes and dtypes, on one line where it fits, never the values of arrays."""

import io
from collections import OrderedDict
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from pytree2safetensors import PyTreeContainer, UnkeyedContainer, load_abstract, save_pytree


class Point(NamedTuple):
    x: Any
    y: Any


@pytest.mark.parametrize(
    ("leaf", "shown"),
    [
        (jnp.zeros((2, 3)), "float32[2,3]"),
        (np.zeros((), np.int8), "int8[]"),
        (1.5, "1.5"),
        (None, "None"),
        ("a\x1b", r"'a\x1b'"),
        (2**65, "36893488147419103232"),
        ([], "[]"),
        ((1,), "(1,)"),
        ({"a": (), 3: {}}, "{'a': (), 3: {}}"),
        (OrderedDict(b=1), "OrderedDict({'b': 1})"),
        (Point(jnp.zeros(1), [2]), "Point(x=float32[1], y=[2])"),
        (UnkeyedContainer([1, UnkeyedContainer()]), "UnkeyedContainer([1, UnkeyedContainer([])])"),
        (PyTreeContainer(), "PyTreeContainer()"),
    ],
)
def test_a_container_shows_its_leaves(leaf: Any, shown: str) -> None:
    assert repr(PyTreeContainer({"a": leaf})) == f"PyTreeContainer(a={shown})"
    assert repr(UnkeyedContainer([leaf])) == f"UnkeyedContainer([{shown}])"


def test_a_long_str_is_cut() -> None:
    shown = f"'{'x' * 22}'...'{'x' * 22}' (1,000 characters)"
    assert repr(PyTreeContainer({"a": "x" * 1000})) == f"PyTreeContainer(\n  a={shown},\n)"


def test_a_tuple_of_one_element_has_a_comma_only_on_one_line() -> None:
    shown = repr(PyTreeContainer({"a": ("x" * 40,), "b": ("x" * 1000,)}))
    cut = f"'{'x' * 22}'...'{'x' * 22}' (1,000 characters)"
    assert shown == f"PyTreeContainer(\n  a=('{'x' * 40}',),\n  b=({cut},),\n)"
    nested = repr(PyTreeContainer({"a": (["x" * 40, "y" * 40],)}))
    assert nested.splitlines()[1:-1] == [
        "  a=(",
        f"    ['{'x' * 40}', '{'y' * 40}'],",
        "  ),",
    ]


@pytest.mark.parametrize(("width", "lines"), [(88, 1), (89, 3)])
def test_a_node_has_a_line_if_it_is_at_most_88_characters_wide(width: int, lines: int) -> None:
    shown = repr(PyTreeContainer({"a" * (width - len("PyTreeContainer(=1)")): 1}))
    assert len(shown.splitlines()) == lines


def test_an_int_beyond_what_python_writes_in_decimal_is_cut() -> None:
    container = PyTreeContainer({"a": 2**20_000, "b": -(2**20_000)})
    assert repr(container) == (
        f"PyTreeContainer(\n  a=0x1{'0' * 41}... (an int),\n  b=-0x1{'0' * 40}... (an int),\n)"
    )


def test_names_that_are_no_identifiers_are_literals() -> None:
    container = PyTreeContainer({"a b": 1, "\x1b[2J": 2, "__repr__": 3})
    assert repr(container) == r"PyTreeContainer('\x1b[2J': 2, __repr__=3, 'a b': 1)"


TREE = """\
PyTreeContainer(
  head=float32[4],
  layers=[
    PyTreeContainer(b=float32[16], w=float32[16,16]),
    PyTreeContainer(b=float32[16], w=float32[16,16]),
  ],
)"""


def model() -> PyTreeContainer:
    layers = [PyTreeContainer({"w": jnp.ones((16, 16)), "b": jnp.ones(16)}) for _ in range(2)]
    return PyTreeContainer({"layers": layers, "head": jnp.zeros(4)})


def test_a_tree_that_is_long_has_a_line_for_each_child() -> None:
    assert repr(model()) == TREE


def test_an_abstract_tree_prints_like_the_tree_itself() -> None:
    file = io.BytesIO()
    save_pytree(model(), file)
    file.seek(0)
    assert repr(load_abstract(file)) == TREE


def test_a_tree_of_many_leaves_prints_in_part() -> None:
    container = PyTreeContainer({"w": [[0, 1]] * 100_000})
    shown = repr(container)
    assert "..." in shown
    assert len(shown) < 2_000_000


def test_a_tree_that_holds_itself_prints() -> None:
    container = PyTreeContainer()
    container.inner = container
    assert "..." in repr(container)
