"""Comparison: the first difference between two trees, bit for bit."""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import jax
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import KeyPathError
from pytree2safetensors._format.tensor import WIDTHS
from pytree2safetensors._leaves.prng_keys import is_key_dtype
from pytree2safetensors._messages import node_at, plural, shorten
from pytree2safetensors._tree.spelling import join, spell_key

# The bits of a value's byte that are used. NumPy ignores the others.
VALUE_BITS: Final = {"bool": 1, **{name: (1 << width) - 1 for name, width in WIDTHS.items()}}

# The kinds of arrays. A subclass of NumPy's array loads as an array.
_KINDS: Final[Mapping[type, str]] = {
    np.ndarray: "a NumPy array",
    np.generic: "a NumPy scalar",
    jax.Array: "a JAX array",
}

_Pairs: TypeAlias = list[tuple[Any, Any]]
_Words: TypeAlias = NDArray[Any]
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
            difference = _other_key(pairs, new_pairs)
        _check(name, difference, how)
        for (path, child), (_, new_child) in zip(pairs, new_pairs, strict=True):
            pending.append((join(name, *map(spell_key, path)), child, new_child))


def _other_key(pairs: _Pairs, new_pairs: _Pairs) -> str | None:
    """Describe the first key that is another one, such as 1, 1.0 and True, which are equal."""
    # In any order: old versions of JAX sort only the children of a defaultdict, not its keys.
    keys = dict.fromkeys(spell_key(path[0]) for path, _ in pairs)
    new_keys = dict.fromkeys(_spelled(path[0]) for path, _ in new_pairs)
    gone = [key for key in keys if key not in new_keys]
    came = [key for key in new_keys if key not in keys]
    return f"it had the key {shorten(gone[0])}, and has {shorten(came[0])}" if gone else None


def _spelled(key: Any) -> str:
    try:
        return spell_key(key)
    except KeyPathError:  # a key that cannot be saved
        return repr(key)


def assert_same_leaves(leaves: Mapping[str, Any], found: Mapping[str, Any], how: str) -> None:
    """Assert that two flat dicts have equal leaves under equal names."""
    for name in leaves.keys() | found.keys():
        if name not in found or name not in leaves:
            _check(name, "it is missing" if name in leaves else "it was not in the tree", how)
        _check(name, _difference(leaves[name], found[name], same_kinds=False), how)


def _check(name: str, difference: str | None, how: str) -> None:
    if difference is not None:
        raise AssertionError(f"{node_at(name)} is different when loaded {how}: {difference}")


def _open(node: Any) -> tuple[_Pairs, Any]:
    """Return the children of a node with their keys, and the structure of the node itself."""
    found: tuple[_Pairs, Any] = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda part: part is not node
    )
    pairs, treedef = found
    return ([] if treedef == _LEAF else pairs), treedef


def _difference(old: Any, new: Any, same_kinds: bool) -> str | None:
    """Describe the difference between two leaves."""
    are_arrays = _is_array(old) and _is_array(new)
    if _kind(old) is not _kind(new) and (same_kinds or not are_arrays):
        return f"it was {_kind_name(old)}, and is {_kind_name(new)}"
    if not are_arrays:
        return _other_number(old, new)
    if old.shape != new.shape:
        return f"its shape was {old.shape}, and is {new.shape}"
    if _native(old.dtype) != _native(new.dtype):
        return f"its dtype was {old.dtype}, and is {new.dtype}"
    if _is_weak(old) != _is_weak(new):
        return f"it was{'' if _is_weak(old) else ' not'} weakly typed"
    return _other_bits(old.shape, _words(old), _words(new))


def _other_number(old: Any, new: Any) -> str | None:
    """Describe the difference between two Python numbers or texts of one type."""
    if not isinstance(old, float | complex):
        return None if old == new else f"it was {old!r}, and is {new!r}"
    if repr(old) != repr(new):
        return f"it was {old!r}, and is {new!r}"
    return _other_bits((), _words(np.array(old)), _words(np.array(new)))  # two NaNs


def _other_bits(shape: tuple[int, ...], old: _Words, new: _Words) -> str | None:
    """Describe the difference between the bits of two arrays."""
    places = (old != new).any(axis=1).nonzero()[0]
    if not places.size:
        return None
    was, now = _hex(old[places[0]]), _hex(new[places[0]])
    if not shape:
        return f"its bits were {was}, and are {now}"
    index = [int(i) for i in np.unravel_index(places[0], shape)]
    count = f"{places.size:,} of {plural(len(old), 'element', 'elements')}"
    return f"its bits differ in {count}; the first, at {index}, was {was}, and is {now}"


def _hex(words: _Words) -> str:
    return " ".join(f"{word:0{2 * words.itemsize}x}" for word in words.tolist())


def _kind(leaf: Any) -> type:
    return next((kind for kind in _KINDS if isinstance(leaf, kind)), type(leaf))


def _kind_name(leaf: Any) -> str:
    return _KINDS.get(_kind(leaf), f"of type {type(leaf).__name__}")


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, tuple(_KINDS))


def _is_weak(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array) or leaf.shape:
        return False
    return bool(getattr(leaf, "weak_type", False))  # a PRNG key has none


def _native(dtype: Any) -> Any:
    return dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype


def _words(leaf: Any) -> _Words:
    """Return the bits of each element as a row of integers: of each part, if it has several."""
    size = leaf.size
    if isinstance(leaf, jax.Array) and is_key_dtype(leaf.dtype):
        leaf = jax.random.key_data(leaf)
    values = np.asarray(leaf)
    if not values.dtype.isnative:
        values = values.byteswap()
    width = values.dtype.itemsize // (2 if values.dtype.kind == "c" else 1)
    words = np.frombuffer(values.tobytes(), f"u{width}")
    if values.dtype.kind == "b":  # any byte other than 0 is true
        words = (words != 0).view(np.uint8)
    elif values.dtype.name in VALUE_BITS:
        words = words & np.uint8(VALUE_BITS[values.dtype.name])
    return words.reshape(size, len(words) // max(size, 1))
