"""Trees and flat dicts: what is accepted and refused, as tables. The laws are in test_laws."""

import io
import os
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oracle import assert_same
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
    string2keypath,
)
from pytree2safetensors.testing import assert_round_trips
from pytree2safetensors.testing._nodes import Keyed, Pair, Record, Unkeyed

# --- both ways --------------------------------------------------------------------------------

TREES: dict[str, tuple[Any, dict[str, Any]]] = {
    "nothing": ({}, {}),
    "a leaf alone": (1, {"": 1}),
    "dicts": ({"a": {"b": 1}, "c": 2}, {"@a@b": 1, "@c": 2}),
    "lists": ([1, [2, 3]], {"#0": 1, "#1#0": 2, "#1#1": 3}),
    "containers": (
        PyTreeContainer({"b": 1, "a": PyTreeContainer({"c": 2})}),
        {"a.c": 2, "b": 1},
    ),
    "unkeyed": (UnkeyedContainer([1, UnkeyedContainer([2])]), {"#\\(0)": 1, "#\\(1)#\\(0)": 2}),
    "all kinds": (
        {"layers": [PyTreeContainer({"w": UnkeyedContainer([1])})]},
        {"@layers#0.w#\\(0)": 1},
    ),
    # What the original release got wrong.
    "an empty name": ({"": {"": 1}}, {"@@": 1}),
    "an empty attribute": (PyTreeContainer({"": 1}), {".": 1}),
    "a dot in a name": ({"a.b": 1, "a": {"b": 2}}, {"@a@b": 2, "@a\\.b": 1}),
    "markers in a name": ({"@#\\": 1}, {"@\\@\\#\\\\": 1}),
    "ints as keys": ({-1: 1, 3: 2}, {"@\\(-1)": 1, "@\\(3)": 2}),
    "an int and its text": ({"3": 1}, {"@3": 1}),
    "a tuple as a key": ({(0, "a.b"): 1}, {"@\\((0, 'a\\.b'))": 1}),
    "the reserved name": (PyTreeContainer({"__metadata__": 1}), {".__metadata__": 1}),
    "the reserved name in a dict": ({"__metadata__": 1}, {"@__metadata__": 1}),
    "eleven children": (list(range(11)), {f"#{index}": index for index in range(11)}),
}


@pytest.mark.parametrize(("tree", "dictionary"), TREES.values(), ids=TREES.keys())
def test_both_ways(tree: Any, dictionary: dict[str, Any]) -> None:
    found = pytree2dict(tree)
    assert found == dictionary
    assert_same(dict2pytree(dictionary), tree)
    assert_same(dict2pytree(dict(reversed(dictionary.items()))), tree)


# Trees of which the names alone tell less: how they flatten, and what the names give.
FLATTENED: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "a tuple": ((1, 2), {"#0": 1, "#1": 2}, [1, 2]),
    "None": ({"a": None, "b": 1}, {"@b": 1}, {"b": 1}),
    "None in a list": ([None, 1, None], {"#1": 1}, [None, 1]),
    "empty nodes": ({"a": {}, "b": [], "c": (), "d": 1}, {"@d": 1}, {"d": 1}),
    "nothing but empty nodes": ([[], {}], {}, {}),
    "OrderedDict": (OrderedDict([("b", 1), ("a", 2)]), {"@b": 1, "@a": 2}, {"b": 1, "a": 2}),
    "defaultdict": (defaultdict(list, b=1, a=2), {"@a": 2, "@b": 1}, {"a": 2, "b": 1}),
    "a namedtuple": (Pair(1, 2), {"first": 1, "second": 2}, {"first": 1, "second": 2}),
    "a dataclass": (Record(1, 2), {"weight": 1, "bias": 2}, {"weight": 1, "bias": 2}),
    "a node without keys": (Unkeyed([1, 2]), {"#\\(0)": 1, "#\\(1)": 2}, (1, 2)),
    "a node with keys": (Keyed({"@a": 1, "@b": 2}), {"@a": 1, "@b": 2}, {"a": 1, "b": 2}),
}
ATTRIBUTES = {"a namedtuple", "a dataclass"}


@pytest.mark.parametrize("name", FLATTENED)
def test_what_names_alone_give(name: str) -> None:
    tree, dictionary, expected = FLATTENED[name]
    found = pytree2dict(tree)
    assert [*found.items()] == [*dictionary.items()]  # in JAX's order of leaves
    assert [*found.values()] == jax.tree_util.tree_leaves(tree)
    if name in ATTRIBUTES:
        expected = PyTreeContainer(expected)
    if name == "a node without keys":
        expected = UnkeyedContainer(expected)
    assert_same(dict2pytree(found), expected)


def test_leaves_are_the_very_objects() -> None:
    leaves = [np.zeros(3), jnp.zeros(3), object(), len, "text"]
    dictionary = pytree2dict(leaves)
    assert all(found is leaf for found, leaf in zip(dictionary.values(), leaves, strict=True))
    tree = dict2pytree(dictionary)
    assert all(found is leaf for found, leaf in zip(tree, leaves, strict=True))
    assert dictionary.keys() == {f"#{index}" for index in range(5)}


def test_no_argument_changes() -> None:
    tree = {"b": [1], "a": PyTreeContainer({"c": 2})}
    dictionary = pytree2dict(tree)
    kept = dict(dictionary)
    built = dict2pytree(dictionary)
    built["b"].append(3)
    built["a"].d = 4
    assert dictionary == kept
    assert_same(tree, {"b": [1], "a": PyTreeContainer({"c": 2})})


def test_any_mapping_will_do() -> None:
    assert dict2pytree(OrderedDict([("#1", 1), ("#0", 0)])) == [0, 1]


# --- what names do not form a tree ------------------------------------------------------------------

BOTH = "make the node at {} two kinds of node at once"
PLACE = "name a leaf and a node at the same place"
EQUAL = "have dict keys that are equal in Python"
CONFLICTS: list[tuple[list[str], str]] = [
    (["a.b", "a@c"], f"'a@c' and 'a.b' {BOTH.format(repr('a'))}"),
    (["a@c", "a.b"], f"'a.b' and 'a@c' {BOTH.format(repr('a'))}"),
    (["a", "@a"], f"'@a' and 'a' {BOTH.format(repr(''))}"),
    (["a", "#0"], f"'#0' and 'a' {BOTH.format(repr(''))}"),
    (["#0", "#\\(0)"], f"'#\\\\(0)' and '#0' {BOTH.format(repr(''))}"),
    (["#0#0", "#0@a"], f"'#0@a' and '#0#0' {BOTH.format(repr('#0'))}"),
    (["@a.b.c", "@a.b#0@c"], f"'@a.b#0@c' and '@a.b.c' {BOTH.format(repr('@a.b'))}"),
    (["a", "a.b"], f"'a' and 'a.b' {PLACE}"),
    (["a.b", "a"], f"'a.b' and 'a' {PLACE}"),
    (["@a", "@a@b@c"], f"'@a' and '@a@b@c' {PLACE}"),
    (["@a@b@c", "@a"], f"'@a@b@c' and '@a' {PLACE}"),
    (["", "a"], f"'' and 'a' {PLACE}"),
    (["#0#1", ""], f"'#0#1' and '' {PLACE}"),
    (["@\\(1)", "@\\(True)"], f"'@\\\\(1)' and '@\\\\(True)' {EQUAL}"),
    (["@\\(1)@a", "@\\(1\\.0)@b"], f"'@\\\\(1)' and '@\\\\(1\\\\.0)@b' {EQUAL}"),
    (["@\\(0)", "@\\(-0\\.0)"], f"'@\\\\(0)' and '@\\\\(-0\\\\.0)' {EQUAL}"),
    (["@\\((1,))", "@\\((True,))"], f"'@\\\\((1,))' and '@\\\\((True,))' {EQUAL}"),
]


@pytest.mark.parametrize(("names", "message"), CONFLICTS, ids=lambda value: str(value)[:40])
def test_conflicts_name_both(names: list[str], message: str) -> None:
    with pytest.raises(TreeStructureError) as caught:
        dict2pytree(dict.fromkeys(names, 1))
    assert str(caught.value) == message


OTHERS: list[tuple[dict[str, Any], str]] = [
    (
        {"@a": 1, "@\\(1)": 2},
        "JAX cannot sort the keys of the dict at '', of these types: int, str; "
        "use keys that compare with each other",
    ),
    (
        {"x@\\(None)": 1, "x@a": 2},
        "JAX cannot sort the keys of the dict at 'x', of these types: NoneType, str; "
        "use keys that compare with each other",
    ),
    ({"#\\(1)": 1}, "the node without keys at '' lacks 1 of its 2 children"),
    ({"a#\\(0)": 1, "a#\\(5)": 1}, "the node without keys at 'a' lacks 4 of its 6 children"),
    (
        {"#\\(2147483647)": 1},
        "the node without keys at '' lacks 2147483647 of its 2147483648 children",
    ),
]


@pytest.mark.parametrize(("dictionary", "message"), OTHERS, ids=lambda value: str(value)[:40])
def test_other_names_that_make_no_tree(dictionary: dict[str, Any], message: str) -> None:
    with pytest.raises(TreeStructureError) as caught:
        dict2pytree(dictionary)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "value", [None, [], [1], {}, {"a": 1}, (), (1,), PyTreeContainer(), Pair(1, 2), Unkeyed([])]
)
def test_a_value_is_a_leaf(value: Any) -> None:
    with pytest.raises(TreeStructureError) as caught:
        dict2pytree({"@a": 1, "@b": value})
    kind = type(value).__name__
    assert str(caught.value) == (
        f"the value of '@b' is of type {kind}, which JAX does not treat as a leaf; "
        "give each of its leaves a name"
    )


@pytest.mark.parametrize("name", [".a", "a\\", "a@\\( 3)", "a.b#-1", "a#1.b#01.c"])
def test_a_name_is_a_key_path(name: str) -> None:
    with pytest.raises(KeyPathError) as expected:
        string2keypath(name)
    for names in ([name], ["x#1", name], [name, "x"]):
        with pytest.raises(KeyPathError) as caught:
            dict2pytree(dict.fromkeys(names, 1))
        assert str(caught.value) == str(expected.value)


# --- gaps -------------------------------------------------------------------------------------


def test_gaps_are_none() -> None:
    assert dict2pytree({"#1": 1}) == [None, 1]
    assert dict2pytree({"a#3#0": 1, "a#1": 2})["a"] == [None, 2, None, [1]]


def test_as_many_gaps_as_there_may_be() -> None:
    tree = dict2pytree({f"#{2**20}": 1})
    assert len(tree) == 2**20 + 1
    assert tree[-1] == 1
    assert tree[:-1] == [None] * 2**20


@pytest.mark.parametrize(
    ("names", "length"),
    [
        ([f"#{2**20 + 1}"], 2**20 + 2),
        (["#2000000000"], 2000000001),
        (["#2147483647"], 2147483648),
        ([f"a#{2**19}", f"b#{2**19 + 1}"], 2**19 + 1),
    ],
)
def test_more_gaps_are_refused(names: list[str], length: int) -> None:
    with pytest.raises(TreeStructureError) as caught:
        dict2pytree(dict.fromkeys(names, 1))
    assert f"would have {length} elements, and the tree more than 1048576 gaps" in str(caught.value)


# --- trees that have no flat dict -------------------------------------------------------------


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


def deep(depth: int) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = [tree]
    return tree


@pytest.mark.parametrize("depth", [100, 199, 200, 201, 500])
def test_deep_trees(depth: int) -> None:
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
def test_cyclic_trees(name: str) -> None:
    with pytest.raises(TreeStructureError, match="is cyclic, or nested deeper than JAX can"):
        pytree2dict(cycles()[name])
    assert pytree2dict([1]) == {"#0": 1}


@jax.tree_util.register_pytree_with_keys_class
class Named:
    """A node whose children have whatever keys it is given."""

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
        "two children of one node have the key path '@a.b': the node type test_tree.Named gives "
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
    """A namedtuple that iterates otherwise than JAX opens it."""

    def __iter__(self) -> Any:
        return reversed(tuple(self[i] for i in range(len(self))))


jax.tree_util.register_pytree_node(
    Masked,
    lambda node: ((node.shown,) if node.masked else (node.shown, node.masked), None),
    lambda _, children: Masked(*children, *[None] * (2 - len(children))),
)


class Unprintable:
    """What a registration keeps apart from the children, and nobody may print."""

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
def test_names_are_those_of_jax(tree: Any) -> None:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    assert [*pytree2dict(tree)] == [keypath2string(path) for path, _ in pairs]
    assert [*pytree2dict(tree).values()] == [leaf for _, leaf in pairs]


def test_many_leaves() -> None:
    tree = {f"layer{number}": {"w": number, "b": [number, number]} for number in range(10_000)}
    found = pytree2dict(tree)
    assert len(found) == 30_000
    assert dict2pytree(found) == tree


# --- what the original release got wrong in files ---------------------------------------------


@pytest.mark.parametrize(
    "tree",
    [
        {"": np.ones(2, np.float32)},
        {"a.b": np.ones(2, np.float32), "a": {"b": np.zeros(2, np.float32)}},
        {-1: np.ones(2, np.float32), 0: np.zeros(1, np.float32)},
        {"#0": np.ones(1, np.float32), "@": np.zeros(1, np.float32)},
        {"a": [], "b": (), "c": {}, "d": None, "e": np.ones(1, np.float32)},
        {"__metadata__": np.ones(1, np.float32)},
        (np.ones(1, np.float32), [np.zeros(1, np.float32)]),
        np.float32(3),
        [],
        None,
        {"count": 3, "rate": 1e-3, "name": "adam", "nesterov": False},
    ],
    ids=str,
)
def test_the_defects_of_the_original(tree: Any, tmp_path: Any) -> None:
    assert_round_trips(tree)
    save_pytree(tree, tmp_path / "tree.safetensors")
    found: Any = jax.tree_util.tree_structure(load_pytree(tmp_path / "tree.safetensors"))
    assert found == jax.tree_util.tree_structure(tree)


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
