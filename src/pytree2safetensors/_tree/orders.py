"""Whether a node of a template has the same children with keys, for the names, as without, for the treedef.

Specification: *Loading into a template*.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pytree2safetensors._errors import TreeStructureError
from pytree2safetensors._messages import node_at, type_name


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
        raise TreeStructureError(
            f"the node type {type_name(type(node))}, of the node at {node_at(name)}, gives JAX "
            "other children with keys than without, or in another order, so it cannot be in a template; "
            "register it so that both are the same"
        )


def _differs(node: Any) -> bool:
    """Return whether JAX rebuilds a node with its children in another order from its keyed treedef.

    The treedefs also differ if only their metadata do, such as a list and a tuple of the same names.
    """
    plain: Any = jax.tree_util.tree_structure(node, is_leaf=_one_level(node))
    _, keyed = jax.tree_util.tree_flatten_with_path(node, is_leaf=_one_level(node))
    try:
        if plain == keyed:
            return False
        children = [object() for _ in range(plain.num_leaves)]
        built = [jax.tree_util.tree_unflatten(treedef, children) for treedef in (plain, keyed)]
        one, other = (
            jax.tree_util.tree_flatten(node, is_leaf=_one_level(node))[0] for node in built
        )
    except Exception:  # noqa: BLE001 - classes may refuse such children or metadata in any way
        return False
    return bool(one != other and {*one} == {*other})


def _one_level(node: Any) -> Callable[[Any], bool]:
    return lambda part: part is not node
