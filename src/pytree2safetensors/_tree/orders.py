"""Whether a node of a template has the same children with keys, for the names, as without, for the treedef.

Specification: *Loading into a template*.
"""

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import jax
import numpy as np

from pytree2safetensors._errors import TreeStructureError
from pytree2safetensors._messages import node_at, type_name

# Since JAX 0.4.36, a treedef says in which order the children of a node are with keys.
_HAS_KEYED_TREEDEFS: Final = hasattr(jax.tree_util.default_registry, "flatten_one_level_with_keys")
_LEVELS: Final = 8  # of new nodes below a node that are compared


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
    plain = _children(node)
    if len(plain) == len(keyed) and all(map(operator.is_, plain, keyed)):
        # Children that are one object do not show their order; the order of Nones does not matter.
        some = [id(child) for child in plain if child is not None]
        differs = len({*some}) < len(some) and not _has_one_treedef(node) and _swaps(node, keyed)
    else:
        differs = _moved(plain, keyed) or _swaps_new(node, plain, keyed)
    if differs:
        raise TreeStructureError(
            f"the node type {type_name(type(node))}, of the node at {node_at(name)}, gives JAX "
            "other children with keys than without, or in another order, so it cannot be in a template; "
            "register it so that both are the same"
        )


def _moved(plain: Sequence[Any], keyed: Sequence[Any]) -> bool:
    """Return whether an object is at another place with keys, or the number of objects differs."""
    known = {*map(id, plain)}
    return len(plain) != len(keyed) or any(
        child is not other and id(child) in known for child, other in zip(keyed, plain, strict=True)
    )


def _swaps_new(node: Any, plain: Sequence[Any], keyed: Sequence[Any]) -> bool:
    """Return whether a type that makes new children each time makes them in two orders."""
    swaps = _swaps(node, keyed)
    if swaps or (swaps is not None and _HAS_KEYED_TREEDEFS):
        return swaps
    try:
        return _differ_below(plain, keyed)
    except Exception:  # noqa: BLE001 - the walk of the template raises the error of a child
        return False


def _differ_below(plain: Sequence[Any], keyed: Sequence[Any]) -> bool:
    """Return whether the children of new nodes, and theirs, are other objects or of another number."""
    for _ in range(_LEVELS):
        pairs = [(one, other) for one, other in zip(plain, keyed, strict=True) if one is not other]
        plain, keyed = [], []
        for one, other in pairs:
            parts, others = _children(one), _children(other)
            plain += parts
            keyed += others
            if len(parts) != len(others):
                return True
        if _moved(plain, keyed):
            return True
    return False


def _has_one_treedef(node: Any) -> bool:
    try:
        return bool(_treedef(node) == _keyed(node)[1])
    except Exception:  # noqa: BLE001 - metadata may refuse to compare in any way
        return False


def _swaps(node: Any, children: Sequence[Any]) -> bool | None:
    """Return whether JAX rebuilds a node, from marked children, with two orders of them.

    Treedefs alone do not tell: they also differ if only their metadata do, such as a list and a tuple
    of the same names.

    Returns:
        None if the type refuses marked children.
    """
    treedefs = _treedef(node), _keyed(node)[1]
    try:
        marked = [_marked(child, number) for number, child in enumerate(children)]
        one, other = (jax.tree_util.tree_unflatten(treedef, marked) for treedef in treedefs)
        first = _marks(_children(one))
        return any(
            marks != first and Counter(marks) == Counter(first)
            for marks in (_marks(_keyed(one)[0]), _marks(_children(other)))
        )
    except Exception:  # noqa: BLE001 - classes may refuse such children in any way
        return None


def _marked(child: Any, number: int) -> Any:
    """Return a child like this one, to one level, with leaves that have a number."""
    if jax.tree_util.all_leaves([child]):
        return _mark(child, number)
    parts = [_mark(part, number) for part in _children(child)]
    return jax.tree_util.tree_unflatten(_treedef(child), parts)


def _mark(leaf: Any, number: int) -> Any:
    if type(leaf) in (int, float, complex):
        return type(leaf)(number)
    dtype = getattr(leaf, "dtype", np.bool_)  # bools are too few to be marks
    try:
        value = np.asarray(number).astype("float32" if dtype == np.bool_ else dtype)
    except TypeError:  # the dtype of a key
        return object()
    return np.broadcast_to(value, getattr(leaf, "shape", (1,)))


def _marks(children: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return the numbers that leaves of children have, or what a type made of them."""
    return [
        tuple(tuple(np.asarray(part).flat[:1].tolist()) for part in parts)
        for parts in (
            [child] if jax.tree_util.all_leaves([child]) else _children(child) for child in children
        )
    ]


def _children(node: Any) -> list[Any]:
    """Return the children of a node, as JAX finds them without keys. A leaf has none."""
    found: Any = jax.tree_util.default_registry.flatten_one_level(node)
    return [] if found is None else [*found[0]]


def _treedef(node: Any) -> Any:
    return jax.tree_util.tree_structure(node, is_leaf=_below(node))


def _keyed(node: Any) -> tuple[list[Any], Any]:
    """Return the children of a node and its treedef, as JAX finds them with keys."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=_below(node))
    return [child for _, child in pairs], treedef


def _below(node: Any) -> Callable[[Any], bool]:
    """Return the function that stops JAX below a node, even if the node is its own child."""
    meetings = 0

    def is_leaf(part: Any) -> bool:
        nonlocal meetings
        meetings += part is node
        return part is not node or meetings > 2  # JAX may look twice

    return is_leaf
