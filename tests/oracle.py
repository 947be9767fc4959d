"""Equality of trees in tests: structure, types, dtypes, shapes, weak types and bits.

Written apart from the comparison inside the package, so that neither can hide the other's mistakes.
"""

import struct
from typing import Any

import jax
import ml_dtypes
import numpy as np

_PARTIAL = {  # bits that count, of dtypes that do not fill their byte
    "int1": 1, "uint1": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4,
    "float6_e2m3fn": 6, "float6_e3m2fn": 6,
}  # fmt: skip


def assert_same(found: Any, expected: Any) -> None:
    """Assert that two trees are equal, including all properties of their leaves."""
    treedef: Any
    pairs, treedef = jax.tree_util.tree_flatten_with_path(found)
    expected_pairs, expected_treedef = jax.tree_util.tree_flatten_with_path(expected)
    assert treedef == expected_treedef, f"{treedef} is not {expected_treedef}"
    assert str(treedef) == str(expected_treedef)  # this distinguishes the keys 1, 1.0 and True
    for (path, leaf), (_, expected_leaf) in zip(pairs, expected_pairs, strict=True):
        assert identity(leaf) == identity(expected_leaf), jax.tree_util.keystr(path)


def assert_loaded(found: Any, saved: Any) -> None:
    """Assert that a tree was loaded as it was saved; NumPy's arrays may have become JAX's."""
    assert_same(canonical(found), canonical(saved))


def is_same(found: Any, expected: Any) -> bool:
    """Return whether two trees are equal."""
    try:
        assert_same(found, expected)
    except AssertionError:
        return False
    return True


def identity(leaf: Any) -> tuple[Any, ...]:
    """Return all that distinguishes one leaf from another."""
    if isinstance(leaf, jax.Array):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # type: ignore[attr-defined] # public, and not exported
            data = np.asarray(jax.random.key_data(leaf))
            return (
                "key",
                str(leaf.dtype),
                str(jax.random.key_impl(leaf)),
                leaf.shape,
                data.tobytes(),
            )
        weak = bool(leaf.aval.weak_type) and leaf.shape == ()
        return ("jax", leaf.dtype.name, leaf.shape, weak, bits(np.asarray(leaf)))
    if isinstance(leaf, np.ndarray | np.generic):
        kind = "numpy" if isinstance(leaf, np.ndarray) else "scalar"
        return (kind, leaf.dtype.str, leaf.dtype.name, leaf.shape, bits(leaf))
    if type(leaf) is float:
        return ("float", struct.pack("<d", leaf))
    if type(leaf) is complex:
        return ("complex", struct.pack("<2d", leaf.real, leaf.imag))
    return (type(leaf), leaf)


def bits(values: Any) -> bytes:
    """The bytes of an array in C order, without the bits that mean nothing."""
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    count = _PARTIAL.get(values.dtype.name, 8)
    return bytes((raw & np.uint8(2**count - 1)).tobytes())


def canonical(tree: Any) -> Any:
    """Return what a tree becomes when it is saved and loaded: NumPy arrays keep only their values."""
    return jax.tree_util.tree_map(canonical_bools, tree)


def canonical_bools(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray | np.generic):
        return leaf
    native = np.array(leaf, order="C").reshape(leaf.shape)
    if not native.dtype.isnative:
        native = native.byteswap().view(native.dtype.newbyteorder("="))
    return jax.device_put(native) if jax_holds(native.dtype) else native


def jax_holds(dtype: Any) -> bool:
    """Whether JAX has arrays of this dtype, without 64 bits unless enabled."""
    if dtype.name in {"int64", "uint64", "float64", "complex128"}:
        return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined] # JAX declares no options
    if dtype.kind in "biufc" and dtype.num < 256:  # NumPy's own
        return True
    if dtype.name.startswith("float6_"):
        return bool(jax.__version_info__ >= (0, 11))
    # An ml_dtypes newer than this JAX has dtypes that it does not know.
    return hasattr(jax.numpy, dtype.name)


def from_bits(bits: int, dtype: Any) -> Any:
    """A 0-d NumPy array with exactly these bits."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype) if isinstance(dtype, str) else dtype)
    raw = bits.to_bytes(dtype.itemsize, "little")
    return np.frombuffer(raw, dtype).reshape(()).copy()


def assert_same_values(found: Any, expected: Any) -> None:
    """Assert that two arrays, of NumPy or JAX, have the same shape, dtype and bits."""
    host = np.asarray(found)
    assert (host.shape, host.dtype) == (expected.shape, expected.dtype)
    assert host.tobytes() == expected.tobytes()
