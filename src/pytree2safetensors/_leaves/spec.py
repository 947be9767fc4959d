"""Leaves without their values, as stored tensors describe them.

Specification: *Leaves*, *Loading*.
"""

from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np

from pytree2safetensors._errors import UnknownHere, UnreadableLeaf
from pytree2safetensors._format.tensor import (
    COMPLEX128,
    NOTED_DTYPES,
    NUMPY,
    SCALARS,
    WEAK,
    TensorInfo,
)
from pytree2safetensors._leaves.jax_versions import (
    ShapeDtypeStruct,
    block_until_ready,
    structs_are_weak,
)
from pytree2safetensors._leaves.prng_keys import key_dtype, key_shape


@lru_cache(maxsize=256)
def _numpy_dtype(dtype: str, kind: str | None) -> np.dtype[Any] | str:
    """Return the NumPy dtype of a tensor's values, or the reason why NumPy lacks it."""
    word = kind if kind in NOTED_DTYPES else NUMPY.get(dtype)
    if kind in COMPLEX128:
        word = "complex128"
    if word is None:
        return (
            f"is of the packed dtype {dtype}, which has no NumPy dtype; "
            "unpack it with the program that wrote it"
        )
    try:
        return np.dtype(getattr(ml_dtypes, word, word))
    except TypeError:
        return f"is of the dtype {word}, which this ml_dtypes lacks; install a newer one"


def numpy_dtype(info: TensorInfo, name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of the values of a tensor."""
    found = _numpy_dtype(info.dtype, info.kind if isinstance(info.kind, str) else None)
    if isinstance(found, str):
        raise UnknownHere(name, found)
    return found


ARRAYS: Final = frozenset({"array", "key"})  # the kinds of leaves that are arrays


class LeafSpec(NamedTuple):
    """A leaf without its values: an "array", "key", "str", or the type of a Python scalar."""

    kind: Literal["array", "key", "str", "int", "float", "bool", "complex"]
    dtype: np.dtype[Any] | None  # of an array
    shape: tuple[int, ...]
    weak: bool = False
    impl: str = ""  # of a key


class TracedSpec(LeafSpec):
    """A leaf whose values JAX will compute later."""

    __slots__ = ()


def spec_of(info: TensorInfo, name: str) -> LeafSpec:
    """Return the leaf that a stored tensor describes."""
    kind, shape = info.kind, info.shape
    if isinstance(kind, list):
        if kind[0] != "key":
            return LeafSpec(kind[0], None, ())
        data = key_shape(kind[1], name)
        if shape[len(shape) - len(data) :] != data or len(shape) < len(data):
            reason = (
                f"is noted as a key of {kind[1]}, whose data must end in the shape {list(data)}, and "
                f"stored with the shape {list(shape)}"
            )
            raise UnreadableLeaf(name, reason)
        return LeafSpec("key", None, shape[: len(shape) - len(data)], impl=kind[1])
    if kind in SCALARS:
        return LeafSpec(kind, None, ())  # type: ignore[arg-type] # one of the literals
    dtype = numpy_dtype(info, name)
    return LeafSpec("array", dtype, info.array_shape, kind in WEAK)


def abstract(leaf: LeafSpec, sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array or key."""
    dtype: Any = leaf.dtype
    if leaf.kind == "key":
        dtype = key_dtype(leaf.impl)
    weak = {"weak_type": True} if leaf.weak and structs_are_weak() else {}
    struct: jax.ShapeDtypeStruct = ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding, **weak)
    return struct


def noted_value(info: TensorInfo) -> Any:
    """Return a leaf that is only in the note."""
    word, argument = info.kind if isinstance(info.kind, list) else ("str", "")
    return int(argument, 16) if word == "int" else argument


def rank_of(dtype: np.dtype[Any]) -> int:
    """Return the rank of a dtype's kind in NumPy's order, including ml_dtypes."""
    if dtype.kind in "buifc":
        return "buifc".index(dtype.kind)
    return 1 if dtype.name.startswith("uint") else 2 if dtype.name.startswith("int") else 3


def jax_holds(dtype: np.dtype[Any]) -> bool:
    """Return whether a jax.Array can have this dtype now."""
    if dtype.kind in "iufc" and dtype.itemsize == (16 if dtype.kind == "c" else 8):
        return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined] # JAX declares no options
    return _jax_holds(dtype)


@lru_cache(maxsize=64)
def _jax_holds(dtype: np.dtype[Any]) -> bool:
    if dtype.kind != "V":  # one of NumPy's own
        return True
    try:
        # The answer must not depend on traces and transfer guards.
        with jax.ensure_compile_time_eval(), jax.transfer_guard("allow"):
            # In a shard_map that is not compiled, this is a tracer, which has nothing to wait for.
            block_until_ready(jax.device_put(np.zeros((), dtype)))
    except Exception as error:  # a backend may raise anything
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # a temporary error, which does not depend on the dtype
        return False
    return True
