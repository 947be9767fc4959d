"""Templates have names from a flattening with keys, and a treedef from one without: both have one order."""

import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import pytest

from pytree2safetensors import (
    TreeStructureError,
    load_into_pytree,
    load_pytree,
    pytree2dict,
    save_pytree,
    set_weights,
)

# Since JAX 0.4.36, a treedef says in which order keys come.
_HAS_KEYED_TREEDEFS = hasattr(jax.tree_util.default_registry, "flatten_one_level_with_keys")


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


class Odd(Node):
    """A node whose metadata do not compare."""


class Listed(Node):
    """A node whose metadata are a tuple with keys, and a list without."""


class Picky(Listed):
    """Such a node that takes only numbers."""

    def __init__(self, **attrs: float) -> None:
        assert all(isinstance(value, float) for value in attrs.values())
        super().__init__(**attrs)


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


register(Node, tuple, tuple)
register(Sorted, tuple, lambda names: tuple(sorted(names)))
register(Fewer, tuple, lambda names: tuple(names)[:1])
register(Fresh, tuple, tuple, lambda node, name: np.array(getattr(node, name)))
register(Odd, Names, Names)
register(Listed, tuple, list)
register(Picky, tuple, list)


def refused(kind: type, place: str) -> Any:
    message = (
        f"the node type test_orders.{kind.__name__}, of the node at {place}, gives JAX other children with "
        "keys than without, or in another order, so it cannot be in a template; register it so that "
        "both are the same"
    )
    return pytest.raises(TreeStructureError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize(
    "node", [Sorted(w=1.0, b=2.0), Sorted(w=[1.0], b=[1.0]), Fewer(w=1.0, b=2.0)]
)
def test_a_template_has_one_order(node: Any, tmp_path: Any) -> None:
    save_pytree(node, tmp_path / "file")
    assert vars(load_pytree(tmp_path / "file")) == vars(node)
    with refused(type(node), "the root"):
        load_into_pytree(node, tmp_path / "file")
    with refused(type(node), "'@a#1'"):
        set_weights({"a": [0, node]}, pytree2dict({"a": [0, node]}))


@pytest.mark.skipif(not _HAS_KEYED_TREEDEFS, reason="JAX makes the same treedef with keys")
def test_a_template_with_equal_leaves_has_one_order() -> None:
    zero = np.zeros(1)
    with refused(Sorted, "the root"):
        set_weights(Sorted(w=zero, b=zero), {"w": zero + 1, "b": zero + 2})


@pytest.mark.parametrize(
    "node",
    [
        Sorted(b=1.0, w=2.0),
        Sorted(b=None, c=None, w=1.0),
        Node(w=1.0, b=1.0),
        Fresh(w=1.0, b=2.0),
        Odd(w=1.0, b=1.0),
        Odd(w=1.0, b=2.0),
        Listed(w=1.0, b=1.0),
        Picky(w=1.0, b=1.0),
    ],
)
def test_a_template_with_one_order_is_loaded(node: Any) -> None:
    given = pytree2dict(node)
    loaded = set_weights(node, {name: 3 * value for name, value in given.items()})
    assert {name: 3 * value for name, value in given.items()} == pytree2dict(loaded)
