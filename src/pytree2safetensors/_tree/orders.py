"""Whether JAX gives the children of a node in one order, with keys for the names and without for the treedef.

Specification: *Loading into a template*.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax

from pytree2safetensors._errors import TreeStructureError
from pytree2safetensors._messages import node_at, type_name

# Since JAX 0.4.36, a flattening with keys has a treedef of its own.
_HAS_KEYED_TREEDEFS: Final = hasattr(jax.tree_util.default_registry, "flatten_one_level_with_keys")


def is_order_known(node: Any, keyed: Sequence[Any], name: str) -> bool:
    """Return whether a node certainly has the same children with keys as without.

    A node with one child has no order, and JAX raises an error if their number differs. Children that
    are new each time, or one object, do not show their order.

    Args:
        node: A node of a registered type.
        keyed: Its children, as JAX finds them with keys.
        name: The spelled key path of the node.

    Raises:
        TreeStructureError: They differ, and the node cannot be rebuilt from its children with keys.
    """
    if len(keyed) < 2:
        return True
    found: Any = jax.tree_util.default_registry.flatten_one_level(node)
    plain = [*found[0]]
    if len(plain) == len(keyed) and all(map(operator.is_, plain, keyed)):
        some = [id(child) for child in plain if child is not None]  # Nones have no order
        if len({*some}) == len(some):
            return True
    known = {*map(id, plain)}
    differs = len(plain) != len(keyed) or any(
        child is not other and id(child) in known for child, other in zip(keyed, plain, strict=True)
    )
    if _is_reordered(node) if _HAS_KEYED_TREEDEFS else differs:
        advice = "" if _HAS_KEYED_TREEDEFS else ", or use JAX 0.4.36 or newer"
        raise TreeStructureError(
            f"the node type {type_name(type(node))}, of the node at {node_at(name)}, gives JAX "
            "other children with keys than without, or in another order, so it cannot be in a template; "
            f"register it so that both are the same{advice}"
        )
    return False


def _is_reordered(node: Any) -> bool:
    """Return whether only a node that is rebuilt from its children with keys has them in another order."""
    return _keeps_order(node, _with_keys) is False and _keeps_order(node, _without_keys) is True


def _keeps_order(node: Any, flatten: Callable[[Any], tuple[list[Any], Any]]) -> bool | None:
    """Return whether a rebuilt node has its children in order, or None if it does not say so."""
    try:
        children, treedef = flatten(node)
        children = [object() for _ in children]
        found, _ = flatten(treedef.unflatten(children))
    except Exception:  # noqa: BLE001 - classes may refuse such children in any way
        return None
    before, after = [*map(id, children)], [*map(id, found)]  # others may not compare
    return before == after if {*before} == {*after} else None


def _with_keys(node: Any) -> tuple[list[Any], Any]:
    pairs, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=_is_inside(node))
    return [child for _, child in pairs], treedef


def _without_keys(node: Any) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten(node, is_leaf=_is_inside(node))


def _is_inside(node: Any) -> Callable[[Any], bool]:
    return lambda part: part is not node


def keyed_structure(tree: Any) -> Any:
    """Return the treedef of a tree, with the children in the order that they have with keys."""
    _, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return treedef
