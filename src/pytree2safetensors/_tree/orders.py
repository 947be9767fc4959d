"""Nodes of templates: JAX flattens them with keys for the names, and without for the treedef.

Specification: *Loading into a template*.
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax

from pytree2safetensors._errors import TreeStructureError
from pytree2safetensors._messages import node_at


def check_order(node: Any, keyed: Sequence[Any], name: str) -> None:
    """Raise an error if a node's children have another order, or number, without keys than with.

    A node with one child has no order, and JAX raises an error if their number differs.

    Args:
        node: A node of a registered type.
        keyed: Its children, as JAX finds them with keys.
        name: The spelled key path of the node.
    """
    if len(keyed) < 2:
        return
    found: Any = jax.tree_util.default_registry.flatten_one_level(node)
    plain = [*found[0]]
    if len(plain) == len(keyed) and all(map(operator.is_, plain, keyed)):
        # Children that are one object do not show their order; the order of Nones does not matter.
        some = [id(child) for child in plain if child is not None]
        differs = len({*some}) < len(some) and _differs(node)
    else:
        # Some types make new children each time, whose order cannot be compared.
        known = {*map(id, plain)}
        differs = len(plain) != len(keyed) or any(
            child is not other and id(child) in known
            for child, other in zip(keyed, plain, strict=True)
        )
    if differs:
        kind = type(node)
        raise TreeStructureError(
            f"the node type {kind.__module__}.{kind.__qualname__}, of the node at {node_at(name)}, gives JAX "
            "other children with keys than without, or in another order, so it cannot be in a template; "
            "register it so that both are the same"
        )


def _differs(node: Any) -> bool:
    """Return whether the treedef of a node says that its children have another order with keys."""

    def is_leaf(part: Any) -> bool:
        return part is not node

    plain: Any = jax.tree_util.tree_structure(node, is_leaf=is_leaf)
    again: Any = jax.tree_util.tree_structure(node, is_leaf=is_leaf)
    _, keyed = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_leaf)
    try:
        return bool(plain == again and plain != keyed)
    except Exception:  # noqa: BLE001 - comparing metadata of foreign types may raise anything
        return False
