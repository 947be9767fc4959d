"""Limits of trees: how deep JAX can flatten one, and which keys it can sort.

Specification: *Trees and flat dicts*.
"""

from collections.abc import Iterable
from typing import Any

import jax

from pytree2safetensors._errors import TreeStructureError, shorten

DEEP = 200  # deeper trees are checked against what JAX can flatten
TOO_DEEP = 10_000  # no JAX flattens this
_FRAMES = 50  # levels of the stack to flatten the deepest node


def check_depth(depth: int, name: str) -> int:
    """Find how deep a tree JAX can flatten; raise an error if a tree is deeper.

    The search uses lists: if a node with a Python function is too deep, JAX loses count of the
    stack, and every later call in this thread is a RecursionError.
    """
    fits, fails = 0, TOO_DEEP + _FRAMES
    while fails - fits > 1:
        middle = (fits + fails) // 2
        lists: list[Any] = []
        for _ in range(middle):
            lists = [lists]
        try:
            jax.tree_util.tree_structure(lists)
            fits = middle
        except (SystemError, RecursionError):
            fails = middle
    if depth > fits - _FRAMES:
        raise too_deep(name)
    return fits - _FRAMES


def too_deep(name: str) -> TreeStructureError:
    """Make the error for a tree that is cyclic or too deep."""
    return TreeStructureError(
        f"the tree below {shorten(name)} is cyclic, or nested deeper than JAX can flatten; "
        "flatten it into fewer levels"
    )


def unsortable(name: str, keys: Iterable[Any]) -> TreeStructureError:
    """Make the error for a dict whose keys JAX cannot sort."""
    kinds = ", ".join(sorted({type(key).__name__ for key in keys}))
    return TreeStructureError(
        f"JAX cannot sort the keys of the dict at {shorten(name)}, of these types: {kinds}; "
        "use keys that compare with each other"
    )
