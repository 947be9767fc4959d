"""Trees and flat dicts: tables of accepted and rejected input. The laws are in test_laws."""

from collections import OrderedDict, defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracle import assert_same
from pytree2safetensors import (
    KeyPathError,
    PyTreeContainer,
    TreeStructureError,
    UnkeyedContainer,
    dict2pytree,
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
    # Trees that 0.1.4 got wrong.
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
def test_trees_and_flat_dicts_correspond(tree: Any, dictionary: dict[str, Any]) -> None:
    found = pytree2dict(tree)
    assert found == dictionary
    assert_same(dict2pytree(dictionary), tree)
    assert_same(dict2pytree(dict(reversed(dictionary.items()))), tree)


# Trees that names do not fully express: the flat dict, and the tree that it builds.
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
def test_names_alone_give_a_similar_tree(name: str) -> None:
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
    (["a", "@a"], f"'@a' and 'a' {BOTH.format('the root')}"),
    (["a", "#0"], f"'#0' and 'a' {BOTH.format('the root')}"),
    (["#0", "#\\(0)"], f"'#\\\\(0)' and '#0' {BOTH.format('the root')}"),
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
        "JAX cannot sort the keys of the dict at the root, of these types: int, str; "
        "use keys that compare with each other",
    ),
    (
        {"x@\\(None)": 1, "x@a": 2},
        "JAX cannot sort the keys of the dict at 'x', of these types: NoneType, str; "
        "use keys that compare with each other",
    ),
    ({"#\\(1)": 1}, "the node without keys at the root lacks 1 of its 2 children"),
    ({"a#\\(0)": 1, "a#\\(5)": 1}, "the node without keys at 'a' lacks 4 of its 6 children"),
    (
        {"#\\(2147483647)": 1},
        "the node without keys at the root lacks 2147483647 of its 2147483648 children",
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


def test_a_list_has_none_at_its_gaps() -> None:
    assert dict2pytree({"#1": 1}) == [None, 1]
    assert dict2pytree({"a#3#0": 1, "a#1": 2})["a"] == [None, 2, None, [1]]


def test_a_list_may_have_as_many_gaps_as_allowed() -> None:
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
    assert f"would have {length} elements, and the tree would have more than 1048576 gaps" in str(
        caught.value
    )


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
