"""Describing leaves: how a file stores each, without its values.

Specification: *Leaves*.
"""

import math
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final

import jax
import numpy as np

from pytree2safetensors._format.header import MAX_DIMENSIONS
from pytree2safetensors._format.tensor import DTYPE_NAMES, NOTED_DTYPES, WEAK_DTYPES, TensorInfo
from pytree2safetensors._leaves.placement import is_unreduced
from pytree2safetensors._leaves.prng_keys import data_shape, implementation_name, is_key_dtype

_SMALLEST, _LARGEST = -(2**63), 2**63 - 1
_INT: Final = TensorInfo("I64", (), 8, "int")


def describe(leaves: Iterable[Any]) -> list[TensorInfo | None]:
    """Describe the tensor of each leaf; None if a file cannot hold it or its values are gone."""
    # By the ids of types, because not every class can be hashed.
    describers = {id(kind): describer for kind, describer in PYTHON_SCALARS.items()}
    found: list[TensorInfo | None] = []
    for leaf in leaves:
        describer = describers.get(id(type(leaf)))
        if describer is None:
            describer = describers[id(type(leaf))] = _describer(type(leaf))
        found.append(describer(leaf))
    return found


def _describer(kind: type) -> Callable[[Any], TensorInfo | None]:
    if issubclass(kind, jax.core.Tracer | np.ma.MaskedArray):
        return lambda _: None
    if issubclass(kind, np.ndarray | np.generic):
        return lambda leaf: info_of(leaf.dtype, leaf.shape)
    return _array_describer() if issubclass(kind, jax.Array) else lambda _: None


def _array_describer() -> Callable[[jax.Array], TensorInfo | None]:
    # By the identity of an aval, which many arrays share. The avals are kept alive for this.
    known: dict[int, tuple[Any, TensorInfo | None]] = {}

    def describe_array(leaf: jax.Array) -> TensorInfo | None:
        aval = leaf.aval
        found = known.get(id(aval))
        if found is None:
            found = known[id(aval)] = aval, _array_info(leaf)
        return None if leaf.is_deleted() else found[1]

    return describe_array


def _array_info(leaf: jax.Array) -> TensorInfo | None:
    aval = leaf.aval
    if is_unreduced(leaf.sharding):  # which its aval says, too
        return None
    if is_key_dtype(aval.dtype):
        return _describe_key(leaf)
    info = info_of(aval.dtype, aval.shape)
    if aval.shape or not aval.weak_type or info is None:
        return info
    if info.kind == "complex128":
        return info._replace(kind="weak complex128")
    return info._replace(kind="weak") if info.kind is None and info.dtype in WEAK_DTYPES else info


def _describe_int(leaf: int) -> TensorInfo:
    if _SMALLEST <= leaf <= _LARGEST:
        return _INT
    return TensorInfo("", (), 0, ["int", hex(leaf)])


# JSON combines two surrogates into one character.
_HALVES: Final = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def _describe_str(leaf: str) -> TensorInfo | None:
    if not leaf.isascii() and _HALVES.search(leaf):
        return None
    return TensorInfo("", (), 0, ["str", leaf])


def _always(info: TensorInfo) -> Callable[[Any], TensorInfo]:
    return lambda _: info


PYTHON_SCALARS: dict[type, Callable[[Any], TensorInfo | None]] = {
    int: _describe_int,
    float: _always(TensorInfo("F64", (), 8, "float")),
    bool: _always(TensorInfo("BOOL", (), 1, "bool")),
    complex: _always(TensorInfo("F64", (2,), 16, "complex")),
    str: _describe_str,
}


_LONG: Final = (np.longdouble, np.clongdouble)  # whatever their size


@lru_cache(maxsize=4096)
def info_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> TensorInfo | None:
    """Describe the tensor of an array; None if a file cannot hold its dtype."""
    if dtype.type in _LONG:
        return None
    name, count = dtype.name, math.prod(shape)
    if name in DTYPE_NAMES:
        return TensorInfo(DTYPE_NAMES[name], shape, count * dtype.itemsize)
    if name in NOTED_DTYPES:
        return TensorInfo(NOTED_DTYPES[name], shape, count, name)
    if name == "complex128" and len(shape) < MAX_DIMENSIONS:  # its tensor has another axis
        return TensorInfo("F64", (*shape, 2), count * 16, name)
    return None


def _describe_key(leaf: jax.Array) -> TensorInfo | None:
    name = implementation_name(leaf)
    if name is None:
        return None
    shape = (*leaf.shape, *data_shape(name))
    return TensorInfo("U32", shape, math.prod(shape) * 4, ["key", name])
