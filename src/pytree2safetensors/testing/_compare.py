"""Comparison: the first difference between two trees, bit for bit."""

import struct
from collections.abc import Mapping
from typing import Any, Final

import jax
import numpy as np

from pytree2safetensors._format.tensor import WIDTHS
from pytree2safetensors._leaves.keys import is_key_dtype
from pytree2safetensors._messages import shorten
from pytree2safetensors._tree.spelling import join, spell_key

# The bits of a value's byte that are used. NumPy ignores the others.
VALUE_BITS: Final = {"bool": 1, **{name: (1 << width) - 1 for name, width in WIDTHS.items()}}

_LEAF: Final = jax.tree_util.tree_structure(0)


def assert_same(tree: Any, found: Any, how: str, *, same_kinds: bool = False) -> None:
    """Assert that two trees are equal in structure and leaves."""
    pending = [("", tree, found)]
    while pending:
        name, old, new = pending.pop()
        (pairs, treedef), (new_pairs, new_treedef) = _open(old), _open(new)
        if treedef == new_treedef == _LEAF:
            difference = _difference(old, new, same_kinds)
        elif treedef != new_treedef:
            shown = shorten(str(treedef)), shorten(str(new_treedef))
            difference = f"it was the node {shown[0]}, and is {shown[1]}"
        else:
            difference = None
        _check(name, difference, how)
        for (path, child), (_, new_child) in zip(pairs, new_pairs, strict=True):
            pending.append((join(name, *map(spell_key, path)), child, new_child))


def assert_same_leaves(leaves: Mapping[str, Any], found: Mapping[str, Any], how: str) -> None:
    """Assert that two flat dicts have equal leaves under equal names."""
    for name in leaves.keys() | found.keys():
        if name not in found or name not in leaves:
            _check(name, "it is missing" if name in leaves else "it was not in the tree", how)
        _check(name, _difference(leaves[name], found[name], same_kinds=False), how)


def _check(name: str, difference: str | None, how: str) -> None:
    if difference is not None:
        raise AssertionError(f"{shorten(name)} is different when loaded {how}: {difference}")


def _open(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Return the children of a node with their keys, and the structure of the node itself."""
    found: tuple[list[tuple[Any, Any]], Any] = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda part: part is not node
    )
    pairs, treedef = found
    return ([] if treedef == _LEAF else pairs), treedef


def _difference(old: Any, new: Any, same_kinds: bool) -> str | None:
    """Describe the difference between two leaves."""
    if same_kinds and _kind(old) is not _kind(new):
        return f"it was a {_kind(old).__name__}, and is a {_kind(new).__name__}"
    if not _is_array(old):
        if type(old) is not type(new):
            return f"it was of type {type(old).__name__}, and is of type {type(new).__name__}"
        return None if _python_bits(old) == _python_bits(new) else f"it was {old!r}, and is {new!r}"
    if not _is_array(new):
        return f"it was an array, and is of type {type(new).__name__}"
    if old.shape != new.shape:
        return f"its shape was {old.shape}, and is {new.shape}"
    if _native(old.dtype) != _native(new.dtype):
        return f"its dtype was {old.dtype}, and is {new.dtype}"
    if _is_weak(old) != _is_weak(new):
        return f"it was{'' if _is_weak(old) else ' not'} weakly typed"
    if _array_bits(old) != _array_bits(new):
        return f"its bits differ: it was {old!r}, and is {new!r}"
    return None


def _kind(leaf: Any) -> type:
    if isinstance(leaf, np.ndarray | np.generic):
        return np.ndarray
    return jax.Array if isinstance(leaf, jax.Array) else type(leaf)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _is_weak(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array) or leaf.shape:
        return False
    return bool(getattr(leaf, "weak_type", False))  # a PRNG key has none


def _native(dtype: Any) -> Any:
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def _python_bits(leaf: Any) -> Any:
    if isinstance(leaf, complex):
        return struct.pack("<2d", leaf.real, leaf.imag)
    return struct.pack("<d", leaf) if isinstance(leaf, float) else leaf


def _array_bits(leaf: Any) -> bytes:
    if isinstance(leaf, jax.Array) and is_key_dtype(leaf.dtype):
        leaf = jax.random.key_data(leaf)
    values = np.asarray(leaf)
    if not values.dtype.isnative:
        values = values.byteswap()
    raw = np.frombuffer(values.tobytes(), np.uint8)
    if values.dtype.kind == "b":  # any byte other than 0 is true
        return bytes(raw != 0)
    return bytes(raw & np.uint8(VALUE_BITS.get(values.dtype.name, 0xFF)))
