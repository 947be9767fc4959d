"""Leaves that are left out: the rest is a tree, and its leaves keep their places."""

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from oracle import assert_loaded, assert_same
from pytree2safetensors import (
    PyTreeContainer,
    UnkeyedContainer,
    UnsupportedLeafError,
    load_pytree,
    save_pytree,
)

Struct: Any = jax.ShapeDtypeStruct
X, Y = np.array([1, 2], np.float32), np.array([3], np.int32)


class Pair(NamedTuple):
    first: Any
    second: Any


CASES: dict[str, tuple[Any, Any]] = {
    "the root": (print, None),
    "of a dict": ({"a": X, "f": print}, {"a": X}),
    "all of a dict": ({"m": {"f": print}, "a": X}, {"m": {}, "a": X}),
    "all of the root": ({"f": print}, {}),
    "of a list": ([X, print, Y], [X, None, Y]),
    "the last of a list": ([X, print], [X, None]),
    "all of a list": ({"m": [print, print]}, {"m": [None, None]}),
    "of a tuple": ((print, X), (None, X)),
    "of attributes": (PyTreeContainer({"a": X, "f": print}), PyTreeContainer({"a": X})),
    "all attributes": ([PyTreeContainer({"f": print})], [PyTreeContainer()]),
    "of a namedtuple": ({"p": Pair(print, X)}, {"p": PyTreeContainer({"second": X})}),
    "of children without keys": (
        UnkeyedContainer([X, print, Y]),
        UnkeyedContainer([X, None, Y]),
    ),
    "of an OrderedDict": (
        OrderedDict(z=X, f=print, a=Y, g=print),
        OrderedDict(z=X, a=Y),
    ),
    "all of an OrderedDict": ({"o": OrderedDict(f=print)}, {"o": OrderedDict()}),
    "deep below": (
        {"a": {"b": {"c": print}}, "d": OrderedDict(e=[{"f": print}], g=X)},
        {"a": {"b": {}}, "d": OrderedDict(e=[{}], g=X)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_remains_is_a_tree(case: str, tmp_path: Path) -> None:
    tree, expected = CASES[case]
    save_pytree(tree, tmp_path / "file", unsupported="skip")
    assert_loaded(load_pytree(tmp_path / "file"), expected)


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        ({"b": {"c": {"g": len}, "h": len}}, {"b": {"c": {}}}),
        ({"a": [{"f": len}, 1], "f": len}, {"a": [{}, 1]}),
        ({"a": [len, 1, len]}, {"a": [None, 1, None]}),
        (PyTreeContainer({"f": len, "x": 1}), PyTreeContainer({"x": 1})),
        (len, None),
    ],
)
def test_what_is_left_after_skipping_is_a_tree(tree: Any, found: Any, tmp_path: Path) -> None:
    save_pytree(tree, tmp_path / "file", unsupported="skip")
    assert_same(load_pytree(tmp_path / "file"), found)


@jax.tree_util.register_pytree_with_keys_class
class Mixed:
    """A node with children of any keys."""

    def __init__(self, keys: list[Any]) -> None:
        self.keys = keys

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], None]:
        return [(key, print) for key in self.keys], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("number", range(16))  # the order of a set of other names is another one
def test_a_node_that_lost_a_dict_key_is_a_dict(tmp_path: Path, number: int) -> None:
    keys = [jax.tree_util.GetAttrKey(f"a{number}"), jax.tree_util.DictKey(f"b{number}")]
    for order in keys, keys[::-1]:
        save_pytree([Mixed(order)], tmp_path / "file", unsupported="skip")
        assert_same(load_pytree(tmp_path / "file"), [{}])


@pytest.mark.parametrize(
    "array",
    [
        np.ma.masked_array(X, [True, False]),
        np.array(["text"]),
        np.array(["2026-11-28"], "datetime64[D]"),
    ],
    ids=["masked", "strings", "dates"],
)
def test_arrays_that_no_file_can_hold_are_left_out(array: Any, tmp_path: Path) -> None:
    tree = {"a": X, "alone": array, "held": SimpleNamespace(array=array)}
    save_pytree(tree, tmp_path / "file", unsupported="skip")
    assert_loaded(load_pytree(tmp_path / "file"), {"a": X})


def test_skipping_leaves_out_no_array(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLeafError, match="concrete arrays"):
        save_pytree([Struct((), np.int32), print], tmp_path / "file", unsupported="skip")

    def save(x: Any) -> Any:
        with pytest.raises(UnsupportedLeafError, match="a traced value"):
            save_pytree([x, print], tmp_path / "file", unsupported="skip")
        return x

    jax.jit(save)(1.0)
    assert not [*tmp_path.iterdir()]
