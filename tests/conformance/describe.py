"""Trees and key paths as the JSON of the conformance kit; its README defines the form."""

import struct
from collections import OrderedDict
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from pytree2safetensors import KeyPath, PyTreeContainer, UnkeyedContainer

# The bits of a value, of dtypes that do not fill their byte.
WIDTHS = {
    "int1": 1, "int2": 2, "int4": 4, "uint1": 1, "uint2": 2, "uint4": 4, "float4_e2m1fn": 4,
    "float6_e2m3fn": 6, "float6_e3m2fn": 6,
}  # fmt: skip


def describe_tree(tree: Any) -> dict[str, Any]:
    """Describe a tree, with the children of each node in JAX's order."""
    if tree is None:
        return {"node": "None"}
    if isinstance(tree, PyTreeContainer):
        items = [[name, describe_tree(tree[name])] for name in tree]
        return {"node": "PyTreeContainer", "items": items}
    if isinstance(tree, UnkeyedContainer | list | tuple):
        return {"node": type(tree).__name__, "items": [describe_tree(child) for child in tree]}
    if isinstance(tree, dict):
        keys = tree if isinstance(tree, OrderedDict) else sorted(tree)
        items = [[describe_key(key), describe_tree(tree[key])] for key in keys]
        return {"node": type(tree).__name__, "items": items}
    return describe_leaf(tree)


def describe_key(key: Any) -> Any:
    """Describe a dict key: a str as itself, anything else as an object with one member."""
    if type(key) is str:
        return key
    if key is None:
        return {"None": None}
    if type(key) is bool:
        return {"bool": key}
    if type(key) is int:
        return {"int": str(key)}
    if type(key) is float:
        return {"float": struct.pack("<d", key).hex()}
    if type(key) is bytes:
        return {"bytes": key.hex()}
    return {"tuple": [describe_key(item) for item in key]}


def describe_path(path: KeyPath) -> list[Any]:
    """Describe a key path."""
    found: list[Any] = []
    for key in path:
        match key:
            case GetAttrKey():
                found.append(["attr", key.name])
            case DictKey():
                found.append(["item", describe_key(key.key)])
            case SequenceKey():
                found.append(["index", key.idx])
            case FlattenedIndexKey():
                found.append(["flat", key.key])
    return found


def describe_leaf(leaf: Any) -> dict[str, Any]:
    """Describe a leaf, its values as the hexadecimal digits of what a file holds."""
    if type(leaf) is str:
        return {"leaf": "str", "value": leaf}
    if type(leaf) is bool:
        return {"leaf": "bool", "value": leaf}
    if type(leaf) is int:
        return {"leaf": "int", "value": hex(leaf)}
    if type(leaf) is float:
        return {"leaf": "float", "bits": struct.pack("<d", leaf).hex()}
    if type(leaf) is complex:
        return {"leaf": "complex", "bits": struct.pack("<2d", leaf.real, leaf.imag).hex()}
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # type: ignore[attr-defined] # public, and not exported
        data = np.asarray(jax.random.key_data(leaf))
        impl = implementation_of(leaf)
        return {"leaf": "key", "impl": impl, "shape": list(leaf.shape), "bits": bits_of(data)}
    found = {
        "leaf": "array",
        "dtype": leaf.dtype.name,
        "shape": list(leaf.shape),
        "bits": bits_of(np.asarray(leaf)),
    }
    weak = isinstance(leaf, jax.Array) and leaf.aval.weak_type and not leaf.shape
    return {**found, "weak": True} if weak else found


def implementation_of(keys: jax.Array) -> str:
    """Name the implementation of keys; not as its str, which is another in older versions of JAX."""
    names = ("threefry2x32", "rbg", "unsafe_rbg")
    return next(name for name in names if jax.random.key(0, impl=name).dtype == keys.dtype)


def bits_of(values: Any) -> str:
    """Write the bytes of an array as a file holds them: little-endian, small dtypes as whole bytes."""
    name = values.dtype.name
    values = np.ascontiguousarray(values).reshape(-1)
    if name in WIDTHS:
        if name.startswith("int"):
            return str(values.astype(np.int8).tobytes().hex())
        return str(
            (values.view(np.uint8) & (2 ** WIDTHS[name] - 1)).astype(np.uint8).tobytes().hex()
        )
    if values.dtype.isbuiltin == 1 or values.dtype.byteorder == ">":
        values = values.astype(values.dtype.newbyteorder("<"))
    return str(values.tobytes().hex())
