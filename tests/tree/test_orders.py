"""Nodes whose children have another order, or number, with keys than without: the keys count."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytree2safetensors import (
    TreeStructureError,
    load_into_pytree,
    load_pytree,
    pytree2dict,
    save_pytree,
    set_weights,
)

# Since JAX 0.4.36, a flattening with keys has a treedef of its own.
HAS_KEYED_TREEDEFS = hasattr(jax.tree_util.default_registry, "flatten_one_level_with_keys")
needs_keyed_treedefs = pytest.mark.skipif(
    not HAS_KEYED_TREEDEFS, reason="JAX makes the same treedef with keys"
)
ZERO = np.zeros(1, np.float32)


class Node:
    """A node, whose attributes have an order."""

    def __init__(self, **attrs: Any) -> None:
        vars(self).update(attrs)


class Sorted(Node):
    """A node whose attributes are in order only without keys."""


class Fewer(Node):
    """A node that has only its first attribute without keys."""


class Fresh(Node):
    """A node that makes its children whenever it is flattened."""


class FreshSorted(Node):
    """Such a node whose attributes are in order only without keys."""


class FreshFewer(Node):
    """Such a node that has only its first attribute without keys."""


class Strict(Node):
    """Such a node, whose attributes are in order only without keys, of lists of strs."""

    def __init__(self, **attrs: list[str]) -> None:
        assert all(isinstance(one, str) for value in attrs.values() for one in value)
        super().__init__(**attrs)


class Odd(Node):
    """A node whose metadata do not compare."""


class OddSorted(Node):
    """A node whose metadata do not compare, and whose attributes are in order only without keys."""


class Listed(Node):
    """A node whose metadata are a tuple with keys, and a list without."""


class FreshListed(Node):
    """Such a node that makes its children whenever it is flattened."""


class Picky(Listed):
    """Such a node that takes only numbers."""

    def __init__(self, **attrs: float) -> None:
        assert all(isinstance(value, float) for value in attrs.values())
        super().__init__(**attrs)


class Swapped(Node):
    """A node that is rebuilt from its children without keys; with keys, they have another order."""


class Wrapped(Node):
    """A node that wraps its children in new objects whenever it is flattened, and takes any children."""


class Broadcast(Node):
    """A node that broadcasts its children whenever it is rebuilt."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**{key: np.broadcast_to(np.asarray(attrs[key]), 3) for key in attrs})


class Drawn:
    """A node with an order of its children without keys, and a function that makes them."""

    def __init__(self, attrs: dict[str, Any], order: tuple[str, ...], make: Any) -> None:
        self.attrs, self.order, self.make = attrs, order, make

    def __repr__(self) -> str:
        return f"Drawn({self.attrs}, {self.order}, {self.make.__name__})"


class Names(tuple[str, ...]):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise TypeError("of metadata")

    __hash__ = None  # type: ignore[assignment] # as for arrays


def register(kind: type, names: Any, plain_names: Any, child: Any = getattr) -> None:
    def with_keys(node: Any) -> tuple[Iterable[tuple[Any, Any]], Any]:
        found = names(vars(node))
        return [(jax.tree_util.GetAttrKey(name), child(node, name)) for name in found], found

    def plain(node: Any) -> tuple[Iterable[Any], Any]:
        found = plain_names(vars(node))
        return (child(node, name) for name in found), found

    def unflatten(names: Any, children: Iterable[Any]) -> Any:
        return kind(**dict(zip(names, children, strict=True)))

    jax.tree_util.register_pytree_with_keys(kind, with_keys, unflatten, plain)


def copied(child: Any) -> Any:
    """Return another list, dict or tuple of the same children, or another array."""
    return type(child)(child) if isinstance(child, list | dict) else np.array(child)


def remade(child: Any) -> Any:
    """Return new nodes with the same leaves."""
    return jax.tree_util.tree_map(lambda leaf: leaf, child)


def recomputed(child: Any) -> Any:
    """Return new nodes with new leaves."""
    return jax.tree_util.tree_map(np.array, child)


def copied_attribute(node: Any, name: str) -> Any:
    return copied(getattr(node, name))


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names))


register(Node, tuple, tuple)
register(Sorted, tuple, in_order)
register(Fewer, tuple, lambda names: tuple(names)[:1])
register(Fresh, tuple, tuple, copied_attribute)
register(FreshSorted, tuple, in_order, copied_attribute)
register(FreshFewer, tuple, lambda names: tuple(names)[:1], copied_attribute)
register(Strict, tuple, in_order, copied_attribute)
register(Odd, Names, Names)
register(OddSorted, Names, lambda names: Names(in_order(names)), copied_attribute)
register(Listed, tuple, list)
register(FreshListed, tuple, list, copied_attribute)
register(Picky, tuple, list)
register(Wrapped, tuple, tuple, lambda node, name: {"child": getattr(node, name)})
register(Broadcast, tuple, tuple, lambda node, name: getattr(node, name)[:])
jax.tree_util.register_pytree_with_keys(
    Swapped,
    lambda node: ([(jax.tree_util.GetAttrKey(key), getattr(node, key)) for key in "wb"], None),
    lambda _, children: Swapped(**dict(zip("bw", children, strict=True))),
    lambda node: ([getattr(node, key) for key in "bw"], None),
)
jax.tree_util.register_pytree_with_keys(
    Drawn,
    lambda node: (
        [(jax.tree_util.GetAttrKey(key), node.make(child)) for key, child in node.attrs.items()],
        (tuple(node.attrs), node.order, node.make),
    ),
    lambda data, children: Drawn(dict(zip(data[0], children, strict=True)), *data[1:]),
    lambda node: (
        [node.make(node.attrs[key]) for key in node.order],
        (node.order, node.order, node.make),
    ),
)


def filled(node: Any) -> dict[str, Any]:
    """Other values for the leaves of a node, by name."""
    return {
        name: str(index) if isinstance(leaf, str) else np.full_like(np.asarray(leaf), index)[()]
        for index, (name, leaf) in enumerate(pytree2dict(node).items())
    }


def check_names(node: Any) -> None:
    """Check that each leaf gets the value of its name."""
    given = filled(node)
    loaded = pytree2dict(set_weights(node, given))
    assert {*loaded} == {*given}
    assert all(np.array_equal(loaded[name], value) for name, value in given.items())


DIFFERENT = [
    Sorted(w=1.0, b=2.0),
    Sorted(w=[1.0], b=[1.0]),
    Sorted(c=1.0, b=2.0, a=3.0),
    Fewer(w=1.0, b=2.0),
]
UNSEEN = [
    Sorted(w=ZERO, b=ZERO),
    Sorted(c=ZERO, b={}, a=ZERO),
    FreshSorted(w=[1.0], b=[2.0]),
    FreshSorted(w={"x": [1.0, 2.0]}, b=[3.0], c=ZERO),
    FreshSorted(w=ZERO, b=ZERO),
    FreshSorted(w=["text"], b=["text"]),
    FreshFewer(w=[1.0], b=[2.0]),
    Strict(w=["w"], b=["b"]),
    OddSorted(w=ZERO, b=ZERO),
]
EQUAL = [
    Sorted(b=1.0, w=2.0),
    Sorted(b=None, c=None, w=1.0),
    Node(w=1.0, b=1.0),
    Fresh(w=1.0, b=2.0),
    Fresh(w=[1.0], b=[1.0], c={"x": 1.0, "y": 2.0}, d=1.0),
    FreshSorted(b=1.0, w=2.0),
    FreshListed(w=[1.0], b=[2.0]),
    Strict(b=["b"], w=["w"]),
    Odd(w=1.0, b=1.0),
    OddSorted(b=1.0, w=2.0),
    Listed(w=1.0, b=1.0),
    Picky(w=1.0, b=1.0),
]


@needs_keyed_treedefs
@pytest.mark.parametrize("node", [*DIFFERENT, *UNSEEN])
def test_keys_say_which_leaf_a_child_is(node: Any, tmp_path: Path) -> None:
    save_pytree(node, tmp_path / "file")
    assert vars(load_pytree(tmp_path / "file")) == vars(node)
    assert vars(load_into_pytree(node, tmp_path / "file")) == vars(node)
    check_names(node)
    check_names({"a": [0, node], "b": Node(x=node)})


@pytest.mark.skipif(HAS_KEYED_TREEDEFS, reason="this JAX has treedefs with keys")
@pytest.mark.parametrize("node", DIFFERENT)
def test_a_template_without_one_order_is_refused(node: Any) -> None:
    message = (
        f"the node type test_orders.{type(node).__name__}, of the node at '@a#1', gives JAX other "
        "children with keys than without, or in another order, so it cannot be in a template; register "
        "it so that both are the same, or use JAX 0.4.36 or newer"
    )
    with pytest.raises(TreeStructureError, match=f"^{re.escape(message)}$"):
        set_weights({"a": [0, node]}, filled({"a": [0, node]}))


@pytest.mark.parametrize(
    "node",
    [
        Swapped(w=1.0, b=2.0),
        Swapped(w=Picky(x=1.0, y=2.0), b=Picky(x=3.0, y=4.0)),
        pytest.param(Swapped(w=ZERO, b=ZERO), marks=needs_keyed_treedefs),
    ],
)
def test_a_template_that_would_swap_its_children_is_refused(node: Any, tmp_path: Path) -> None:
    save_pytree([node], tmp_path / "file")
    message = (
        "the node type test_orders.Swapped, of the node at '#0', gives JAX other children with keys "
        "than without, or in another order, so it cannot be in a template; register it so that both "
        "are the same"
    )
    with pytest.raises(TreeStructureError, match=f"^{re.escape(message)}") as caught:
        load_into_pytree([node], tmp_path / "file")
    assert str(caught.value).endswith(
        "same" if HAS_KEYED_TREEDEFS else ", or use JAX 0.4.36 or newer"
    )


@pytest.mark.parametrize("node", EQUAL)
def test_a_node_with_one_order_is_loaded(node: Any) -> None:
    check_names(node)


@pytest.mark.parametrize("node", [Wrapped(w=1.0, b=2.0), Broadcast(w=ZERO, b=ZERO)])
def test_a_node_that_makes_other_children_is_loaded(node: Any, tmp_path: Path) -> None:
    save_pytree(node, tmp_path / "file")
    assert type(load_into_pytree(node, tmp_path / "file")) is type(node)


@needs_keyed_treedefs
def test_keys_count_in_a_deep_tree() -> None:
    node: Any = Sorted(w=1.0, b=2.0)
    for _ in range(300):
        node = [node]
    check_names(node)


def children() -> st.SearchStrategy[Any]:
    leaves = st.sampled_from([0.0, 1, ZERO, np.zeros((2, 3), np.int8), np.zeros(0)])
    return leaves | st.lists(leaves, max_size=2) | st.dictionaries(st.sampled_from("xy"), leaves)


@needs_keyed_treedefs
@example([("c", ZERO), ("b", {}), ("a", ZERO)], ["a", "b", "c"], lambda child: child)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), children()), unique_by=lambda pair: pair[0]),
    st.permutations("abcd"),
    st.sampled_from([lambda child: child, copied, remade, recomputed]),
)
def test_leaves_get_the_values_of_their_names(
    attrs: list[tuple[str, Any]], order: list[str], make: Any
) -> None:
    names = [name for name, _ in attrs]
    check_names(Drawn(dict(attrs), tuple(name for name in order if name in names), make))
