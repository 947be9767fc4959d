"""Trees that have no flat dict, the order of keys, and trees that are deep or large."""

import io
import os
import subprocess
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytree2safetensors import (
    KeyPathError,
    PyTreeContainer,
    TreeStructureError,
    UnkeyedContainer,
    dict2pytree,
    keypath2string,
    load_pytree,
    pytree2dict,
    save_pytree,
    set_weights,
)
from pytree2safetensors._tree import depth as limits
from pytree2safetensors._tree.unflatten import build_tree
from pytree2safetensors.testing import assert_round_trips
from pytree2safetensors.testing._nodes import Keyed, Pair, Record, Unkeyed


@given(st.lists(st.text("ab.@#\\01", max_size=3) | st.text(max_size=2), unique=True))
def test_dicts_have_the_order_of_keys_in_which_jax_flattens_them(keys: list[str]) -> None:
    tree = {key: place for place, key in enumerate(keys)}
    flat = pytree2dict(tree)
    file = io.BytesIO()
    save_pytree(tree, file)
    file.seek(0)
    for found in (dict2pytree(flat), dict2pytree(dict(reversed(flat.items()))), load_pytree(file)):
        assert [*found] == sorted(keys)


def test_numbers_are_in_their_order() -> None:
    flat = {rf"@\({number})": number for number in (10, 2, 1, 0, 11)}
    assert [*dict2pytree(flat)] == [0, 1, 2, 10, 11]


def deep(depth: int, tree: Any = 1) -> Any:
    for _ in range(depth):
        tree = [tree]
    return tree


@pytest.mark.parametrize("depth", [100, 199, 200, 201, 500])
def test_deep_trees_become_flat_dicts_and_come_back(depth: int) -> None:
    tree = deep(depth)
    assert pytree2dict(tree) == {"#0" * depth: 1}
    assert dict2pytree({"#0" * depth: 1}) == tree


AS_DEEP_AS_JAX = """
import jax
import numpy as np
import pytree2safetensors as p2s

def nested(wrap, depth):
    tree = np.ones(2, np.float32)
    for _ in range(depth):
        tree = wrap(tree)
    return tree

def fits(depth):
    try:
        jax.tree_util.tree_structure(nested(lambda child: [child], depth))
        return True
    except (SystemError, RecursionError):
        return False

most = max(filter(fits, range(900, 1000))) if fits(900) and not fits(1000) else 900
for wrap, less in (
    (lambda child: [child], 0),
    (lambda child: {"a": child}, 0),
    (lambda child: (child,), 0),
    (lambda child: p2s.PyTreeContainer({"a": child}), 3),  # JAX calls a function of its type
):
    tree = nested(wrap, most - less)
    p2s.save_pytree(tree, "file")
    p2s.save_pytree_async(tree, "file").result()
    for found in (
        p2s.load_pytree("file"),
        p2s.load_abstract("file"),
        p2s.load_into_pytree(tree, "file"),
        p2s.set_weights(tree, p2s.pytree2dict(tree)),
        p2s.dict2pytree(p2s.pytree2dict(tree)),
    ):
        assert len(jax.tree_util.tree_leaves(found)) == 1
"""


def test_trees_may_be_as_deep_as_jax_takes(tmp_path: Path) -> None:
    # A script, because JAX takes less below the frames of a test.
    result = subprocess.run(
        [sys.executable, "-c", AS_DEEP_AS_JAX],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_how_deep_a_tree_may_be_depends_on_python() -> None:
    most = limits._most_lists()
    if sys.version_info < (3, 12):
        assert 950 < most < 1000
    else:
        assert most > 1000


def works(function: Callable[..., object], *arguments: Any) -> bool:
    try:
        function(*arguments)
    except (SystemError, RecursionError, TreeStructureError):
        return False
    return True


# What many nested lists contain, and its kind in the note.
INNERMOST: list[tuple[Any, Any]] = [
    (1, None),
    (None, "None"),
    ([], "list"),
    ({}, "dict"),
    ((), "tuple"),
    (OrderedDict(), ["OrderedDict", []]),
    (PyTreeContainer(), "PyTreeContainer"),
    (UnkeyedContainer(), "UnkeyedContainer"),
]


@pytest.mark.parametrize(("node", "kind"), INNERMOST, ids=[repr(node) for node, _ in INNERMOST])
def test_a_tree_has_a_flat_dict_if_jax_can_flatten_it(node: Any, kind: Any) -> None:
    most = limits._most_lists()
    is_plain = type(node) in {int, type(None), list, dict, tuple}  # JAX needs no Python function
    for levels in range(most - 8, most + 3):
        tree, name = deep(levels, node), "#0" * levels
        leaves, kinds = ({name: node}, {}) if kind is None else ({}, {name: kind})
        found = works(pytree2dict, tree)
        assert works(build_tree, leaves, kinds) == found
        if is_plain and levels < limits.TOO_DEEP - 1:
            assert works(limits.deep_structure, tree) == found
        assert found or levels > most - 5


def test_an_empty_container_of_python_takes_one_level() -> None:
    check = limits.DepthCheck()
    check.limit = limits.DEEP
    for kind in (dict, list, tuple, type(None)):
        check.check(limits.DEEP, kind, "", has_children=False)
        with pytest.raises(TreeStructureError, match="nested deeper than JAX can flatten"):
            check.check(limits.DEEP, kind, "")


def test_a_template_may_be_as_deep_as_jax_takes_below_few_frames() -> None:
    flat = {"#0" * (limits._most_lists() - 1): 2}
    assert pytree2dict(set_weights(deep(limits._most_lists() - 1), flat)) == flat


@pytest.mark.parametrize("depth", [20_000, 100_000])
def test_trees_that_are_too_deep(depth: int) -> None:
    message = "is cyclic, or nested deeper than JAX can flatten; flatten it into fewer levels"
    with pytest.raises(TreeStructureError, match=message):
        pytree2dict(deep(depth))
    for marker in ("#0", "@a", ".a", "#\\(0)"):
        with pytest.raises(TreeStructureError, match=message):
            dict2pytree({("a" if marker == ".a" else "") + marker * depth: 1})


def test_what_follows_a_tree_that_is_too_deep() -> None:
    for _ in range(3):
        with pytest.raises(TreeStructureError):
            pytree2dict(deep(20_000))
    assert pytree2dict({"a": [1]}) == {"@a#0": 1}
    assert sys.getrecursionlimit() < 20_000


def cycles() -> dict[str, Any]:
    in_list: list[Any] = [1]
    in_list.append(in_list)
    in_dict: dict[str, Any] = {"a": 1}
    in_dict["b"] = {"c": in_dict}
    in_container = PyTreeContainer({"a": 1})
    in_container.b = [in_container]
    in_node = Unkeyed([])
    in_node.children.append(in_node)
    return {"list": in_list, "dict": in_dict, "container": in_container, "node": in_node}


@pytest.mark.parametrize("name", cycles())
def test_cyclic_trees_are_refused(name: str) -> None:
    with pytest.raises(TreeStructureError, match="is cyclic, or nested deeper than JAX can"):
        pytree2dict(cycles()[name])
    assert pytree2dict([1]) == {"#0": 1}


@jax.tree_util.register_pytree_with_keys_class
class Named:
    """A node with any keys."""

    def __init__(self, *pairs: Any) -> None:
        self.pairs = pairs

    def tree_flatten_with_keys(self) -> Any:
        return self.pairs, tuple(key for key, _ in self.pairs)

    @classmethod
    def tree_unflatten(cls, keys: Any, children: Any) -> "Named":
        return cls(*zip(keys, children, strict=True))


item, attr, index = (
    jax.tree_util.DictKey,
    jax.tree_util.GetAttrKey,
    jax.tree_util.SequenceKey,
)


def test_two_children_of_one_key_path() -> None:
    tree = {"a": Named((attr("b"), 1), (attr("b"), 2))}
    with pytest.raises(KeyPathError) as caught:
        pytree2dict(tree)
    assert str(caught.value) == (
        "two children of one node have the key path '@a.b': the node type test_no_flat_dict.Named gives "
        "both one key"
    )


@pytest.mark.parametrize("children", [([1], [2]), ({"p": 1}, {"q": 2}), ([], ()), (None, 1)])
def test_two_nodes_of_one_key_path(children: tuple[Any, Any]) -> None:
    tree = Named(*((attr("b"), child) for child in children))
    with pytest.raises(KeyPathError, match="two children of one node have the key path 'b'"):
        pytree2dict(tree)


def test_keys_that_are_equal_and_spelled_apart() -> None:
    tree = Named((item(1), "int"), (item(True), "bool"), (item(1.0), "float"))
    found = pytree2dict(tree)
    assert found == {"@\\(1)": "int", "@\\(True)": "bool", "@\\(1\\.0)": "float"}
    with pytest.raises(TreeStructureError, match="equal in Python"):
        dict2pytree(found)


def test_keys_without_a_spelling() -> None:
    for key, reason in [
        (item(float("nan")), "which is not finite"),
        (item(1j), "a dict key must be a str, None, bool"),
        ("text", "not one of JAX's own key classes"),
    ]:
        with pytest.raises(KeyPathError, match=reason) as caught:
            pytree2dict({"layers": [Named((key, 1))]})
        assert str(caught.value).endswith("in a key path that begins '@layers#0'")


def test_dicts_that_jax_cannot_sort() -> None:
    with pytest.raises(TreeStructureError) as caught:
        pytree2dict([{"a": 1, 2: 3}])
    assert str(caught.value) == (
        "JAX cannot sort the keys of the dict at '#0', of these types: int, str; "
        "use keys that compare with each other"
    )
    unsorted = OrderedDict([("a", 1), (2, 3)])
    assert pytree2dict(unsorted) == {"@a": 1, "@\\(2)": 3}
    assert_round_trips(unsorted)


class Layer(NamedTuple):
    weight: Any
    bias: Any


class Masked(NamedTuple):
    """A namedtuple whose registration keeps back what is masked."""

    shown: Any
    masked: Any


class Backwards(Layer):
    """A namedtuple that iterates over other values than JAX."""

    def __iter__(self) -> Any:
        return reversed(tuple(self[i] for i in range(len(self))))


jax.tree_util.register_pytree_node(
    Masked,
    lambda node: ((node.shown,) if node.masked else (node.shown, node.masked), None),
    lambda _, children: Masked(*children, *[None] * (2 - len(children))),
)


class Unprintable:
    """Auxiliary data of a node that must not be printed."""

    def __repr__(self) -> str:
        raise RuntimeError


class Apart(NamedTuple):
    """A namedtuple whose registration keeps something apart."""

    child: Any


jax.tree_util.register_pytree_node(
    Apart, lambda node: (tuple(node), Unprintable()), lambda _, children: Apart(*children)
)


@pytest.mark.parametrize(
    "tree",
    [
        {
            "params": [Layer(1, 2), Record(3, (4, None))],
            "state": OrderedDict(z=Unkeyed([5, {6: 7}]), a=defaultdict(int, b=8)),
            "other": Keyed({".x": 9, "@y": 10, "#3": 11}),
        },
        [Layer(1, Layer(2, Layer(None, 3))), Layer(Layer(4, ()), [Layer(5, 6)])],
        [Pair(Layer(1, 2), Pair(3, 4)), Layer(Pair(5, 6), None)],
        [Masked(1, 0), Masked(2, 1), Masked(3, False)],
        [Apart(1), Apart(2)],
        [Backwards(1, 2), Backwards(3, 4), Layer(5, 6)],
        [Record(1, 2), Record(3, None), Unkeyed([4]), Unkeyed([5, 6]), Keyed({"@y": 7}), Keyed({})],
    ],
    ids=[
        "all kinds",
        "namedtuples",
        "two types",
        "registered",
        "unprintable",
        "own iteration",
        "other nodes",
    ],
)
def test_names_are_the_key_paths_of_jax_in_its_order(tree: Any) -> None:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    assert [*pytree2dict(tree)] == [keypath2string(path) for path, _ in pairs]
    assert [*pytree2dict(tree).values()] == [leaf for _, leaf in pairs]


def test_trees_of_many_leaves_come_back() -> None:
    tree = {f"layer{number}": {"w": number, "b": [number, number]} for number in range(10_000)}
    found = pytree2dict(tree)
    assert len(found) == 30_000
    assert dict2pytree(found) == tree


class Node:
    """A node whose one child is set later."""

    def __init__(self, child: Any = None) -> None:
        self.child = child


jax.tree_util.register_pytree_node(Node, lambda node: ([node.child], None), lambda _, c: Node(*c))


def unflattenable() -> list[Any]:
    alone, in_list, container = Node(), Node(), PyTreeContainer()
    alone.child, in_list.child, container.me = alone, [in_list], container
    deep: Any = Node()
    for _ in range(12_000):  # with Python 3.13 JAX flattens nearly 10,000
        deep = Node(deep)
    return [alone, in_list, container, deep, {"a": container, 1: 2}, [1, container]]


def frames_left() -> int:
    """How many calls the stack still takes: JAX can lose count of them."""
    return 1 + frames_left_below(0)


def frames_left_below(depth: int) -> int:
    try:
        return frames_left_below(depth + 1)
    except RecursionError:
        return depth


@pytest.mark.parametrize("tree", unflattenable(), ids=range(6))
def test_what_cannot_be_flattened_costs_the_thread_nothing(tree: Any, tmp_path: Path) -> None:
    before = frames_left()
    for use in (pytree2dict, lambda tree: save_pytree(tree, tmp_path / "file")):
        with pytest.raises((TreeStructureError, KeyPathError)):
            use(tree)
    assert frames_left() >= before
    assert not [*tmp_path.iterdir()]
