"""Trees of flat dicts.

Specification: *Trees and flat dicts*.
"""

from collections.abc import Mapping
from typing import Any

import jax

from pytree2safetensors._arguments import checked
from pytree2safetensors._errors import TreeStructureError
from pytree2safetensors._messages import shorten
from pytree2safetensors._tree.pytree import PyTree
from pytree2safetensors._tree.unflatten import build_tree


@checked
def dict2pytree(dictionary: Mapping[str, Any]) -> PyTree:
    """Build a tree from a flat dict: the inverse of `pytree2dict`.

    Attributes become `PyTreeContainer`s, dict keys become dicts, indices become lists, and children
    without keys become `UnkeyedContainer`s. A list has `None` at indices that have no leaf.

    Args:
        dictionary: A mapping from spelled key paths to leaves.

    Returns:
        A new tree with the same leaves, which are not copied.

    Raises:
        KeyPathError: A name is not a key path.
        TreeStructureError: The names do not form a tree, or a value is not a leaf.

    Specification: *Trees and flat dicts*.

    >>> dict2pytree({"@layers#0@w": 1.0, "@layers#1@w": 2.0})
    {'layers': [{'w': 1.0}, {'w': 2.0}]}
    """
    leaf_types: set[int] = set()  # ids, because not every class can be hashed
    for name, leaf in dictionary.items():
        if id(type(leaf)) not in leaf_types:
            if not jax.tree_util.all_leaves([leaf]):
                raise TreeStructureError(
                    f"the value of {shorten(name)} is of type {type(leaf).__name__}, which JAX "
                    "does not treat as a leaf; give each of its leaves a name"
                )
            leaf_types.add(id(type(leaf)))
    return build_tree(dictionary, {})
