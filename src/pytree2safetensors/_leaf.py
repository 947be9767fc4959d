"""Leaves and tensors: what a file holds of a leaf, and the leaf that a tensor was.

No other module knows a dtype.
"""

import cmath
import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.experimental
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import FileFormatError, shorten
from pytree2safetensors._trie import Kind

_Struct: Any = jax.ShapeDtypeStruct  # whose constructor JAX leaves untyped
is_subdtype: Any = jax.dtypes.issubdtype  # type: ignore[attr-defined] # public, and not exported

# --- tables -----------------------------------------------------------------------------------

# The bits of one element of every dtype that the format knows.
BITS: Final = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# NumPy's names of the dtypes that the format spells.
_NATIVE: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "float16": "F16",
    "bfloat16": "BF16", "uint32": "U32", "int32": "I32", "float32": "F32", "complex64": "C64",
    "uint64": "U64", "int64": "I64", "float64": "F64", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_NUMPY: Final = {spelled: name for name, spelled in _NATIVE.items()}

# The dtypes that it does not spell: noted by their names, stored one value a byte as this dtype.
_NOTED: Final = {
    "int1": "I8", "int2": "I8", "int4": "I8", "uint1": "U8", "uint2": "U8", "uint4": "U8",
    "float4_e2m1fn": "U8", "float6_e2m3fn": "U8", "float6_e3m2fn": "U8", "float8_e3m4": "U8",
    "float8_e4m3": "U8", "float8_e4m3b11fnuz": "U8",
}  # fmt: skip
_WIDTHS: Final = {  # in bits, of those that do not fill their byte
    "int1": 1, "int2": 2, "int4": 4, "uint1": 1, "uint2": 2, "uint4": 4, "float4_e2m1fn": 4,
    "float6_e2m3fn": 6, "float6_e3m2fn": 6,
}  # fmt: skip

_SCALARS: Final = {"int": "I64", "float": "F64", "bool": "BOOL", "complex": "F64"}
_PRNG: Final = ("threefry2x32", "rbg", "unsafe_rbg")  # what every JAX version registers

COMPLEX128: Final = ("complex128", "weak complex128")  # an axis of 2 for the parts
WEAK: Final = ("weak", "weak complex128")
LEAF_KINDS: Final = frozenset({*_SCALARS, *_NOTED, *COMPLEX128, *WEAK, "key", "str"})


# --- what a file holds of a leaf --------------------------------------------------------------


class Form(NamedTuple):
    """What a file holds of one leaf: a tensor (none where dtype is ""), and a note."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    kind: Kind | None = None


_SMALLEST, _LARGEST = -(2**63), 2**63 - 1


def describe(leaf: Any) -> Form | None:
    """The form of a leaf; None where a file cannot hold it."""
    kind = type(leaf)
    describer = _DESCRIBERS.get(kind)
    if describer is None:
        describer = _describer(kind)
        if kind.__module__.partition(".")[0] in {"jaxlib", "numpy"}:  # few, and there to stay
            _DESCRIBERS[kind] = describer
    return describer(leaf)


def _describer(kind: type) -> Callable[[Any], Form | None]:
    if issubclass(kind, jax.core.Tracer | np.ma.MaskedArray):
        return lambda _: None
    if issubclass(kind, np.ndarray | np.generic):
        return lambda leaf: form_of(leaf.dtype, leaf.shape)
    if issubclass(kind, jax.Array):
        return _describe_array
    return lambda _: None


class DeletedLeaf(Exception):
    """An array whose values are gone."""


def _describe_array(leaf: jax.Array) -> Form | None:
    if leaf.is_deleted():
        raise DeletedLeaf
    aval = leaf.aval
    if is_key_dtype(aval.dtype):
        return _describe_key(leaf)
    form = form_of(aval.dtype, aval.shape)
    if aval.shape or not aval.weak_type or form is None or form.kind in _NOTED:
        return form
    return form._replace(kind="weak" if form.kind is None else "weak complex128")


def is_key_dtype(dtype: Any) -> bool:
    """Whether arrays of a dtype are typed PRNG keys."""
    return not isinstance(dtype, np.dtype) and bool(is_subdtype(dtype, jax.dtypes.prng_key))


def _describe_int(leaf: int) -> Form:
    if _SMALLEST <= leaf <= _LARGEST:
        return Form("I64", (), 8, "int")
    return Form("", (), 0, ["int", hex(leaf)])


# JSON reads two such halves as the one character that they would be in UTF-16.
_HALVES: Final = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def _describe_str(leaf: str) -> Form | None:
    if not leaf.isascii() and _HALVES.search(leaf):
        return None
    return Form("", (), 0, ["str", leaf])


PYTHON_SCALARS: dict[type, Callable[[Any], Form | None]] = {
    int: _describe_int,
    float: lambda _: Form("F64", (), 8, "float"),
    bool: lambda _: Form("BOOL", (), 1, "bool"),
    complex: lambda _: Form("F64", (2,), 16, "complex"),
    str: _describe_str,
}
_DESCRIBERS: dict[type, Callable[[Any], Form | None]] = {**PYTHON_SCALARS}


_LONG: Final = (np.longdouble, np.clongdouble)  # whatever their size


@lru_cache(maxsize=4096)
def form_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Form | None:
    """The form of an array; None where a file cannot hold its dtype."""
    if dtype.type in _LONG:
        return None
    name, count = dtype.name, math.prod(shape)
    if name in _NATIVE:
        return Form(_NATIVE[name], shape, count * dtype.itemsize)
    if name in _NOTED:
        return Form(_NOTED[name], shape, count, name)
    if name == "complex128":
        return Form("F64", (*shape, 2), count * 16, name)
    return None


def _describe_key(leaf: jax.Array) -> Form | None:
    name = _implementation(leaf)
    if name is None:
        return None
    data = jax.eval_shape(jax.random.key_data, leaf)
    return Form("U32", data.shape, math.prod(data.shape) * 4, ["key", name])


def _implementation(leaf: Any) -> str | None:
    """The registered name of a key's implementation."""
    found = jax.random.key_impl(leaf)
    if isinstance(found, str):
        return found
    # Older versions answer with an object, which only compares.
    same = (name for name in _PRNG if jax.random.key_impl(jax.random.key(0, impl=name)) == found)
    return next(same, None)


def host_array(leaf: Any) -> NDArray[Any]:
    """The values of a leaf that has a tensor, without a copy where the host holds them."""
    kind = type(leaf)
    if kind is complex:
        return np.array([leaf.real, leaf.imag])
    if kind in PYTHON_SCALARS:
        return np.array(leaf, _NUMPY[_SCALARS[kind.__name__]])
    if isinstance(leaf, np.ndarray | np.generic):
        return np.asarray(leaf)
    if is_key_dtype(leaf.dtype):
        leaf = jax.random.key_data(leaf)
    if len(leaf.sharding.device_set) == 1 or leaf.is_fully_replicated:
        return np.asarray(leaf)
    whole = np.empty(leaf.shape, leaf.dtype)  # unlike np.asarray, leaves no copy inside the leaf
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = np.asarray(shard.data)
    return whole


def joined_bytes(leaves: list[Any], forms: list[Form]) -> bytes:
    """The bytes of small tensors, one after the other."""
    single = jax.sharding.SingleDeviceSharding
    parts = [
        leaf
        if form.kind is None
        and form.dtype in _BUFFERS
        and type(getattr(leaf, "sharding", None)) is single
        else _small_bytes(leaf, form)
        for leaf, form in zip(leaves, forms, strict=True)
    ]
    try:
        return b"".join(parts)
    except TypeError:  # on other devices, or in a layout of its own, an array is no buffer
        return b"".join(map(_small_bytes, leaves, forms))


def _small_bytes(leaf: Any, form: Form) -> bytes:
    return b"".join(memoryview(block) for block in blocks(host_array(leaf), form))  # type: ignore[arg-type] # before 3.12 no type says buffer


# Dtypes in which an array of JAX is a buffer of its values, as the file has them.
_BUFFERS: Final = frozenset(
    {"BOOL", "U8", "I8", "U16", "I16", "F16", "U32", "I32", "F32", "C64", "U64", "I64", "F64"}
    if sys.byteorder == "little"
    else ()
)


def host_shard(data: jax.Array) -> NDArray[Any]:
    """The values of one shard of an array."""
    if is_key_dtype(data.dtype):
        data = jax.random.key_data(data)
    # Another array of the same memory, so that no copy on the host stays inside the shard.
    alias = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
    return np.asarray(alias)


_BLOCK = 1 << 22


def blocks(values: NDArray[Any], form: Form) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor in order, the whole at once where that takes no copy."""
    plain = _plain(values, form)
    if values.flags.c_contiguous and plain:
        yield values.reshape(-1).view(np.uint8)
        return
    pending = [values]
    while pending:
        part = pending.pop()
        if part.nbytes <= _BLOCK:
            yield to_bytes(part, form)
        else:
            rows = max(1, _BLOCK * len(part) // part.nbytes) if len(part) > 1 else 0
            if not rows:
                pending.append(part[0])
            else:
                starts = range(0, len(part), rows)
                pending.extend(part[start : start + rows] for start in reversed(starts))


def _plain(values: NDArray[Any], form: Form) -> bool:
    return _width(form) is None and values.dtype.newbyteorder("<") == values.dtype


def to_bytes(values: NDArray[Any], form: Form) -> NDArray[np.uint8]:
    """The bytes of values: little-endian, row-major, in one canonical form."""
    if not _plain(values, form) and _width(form) is None:
        values = values.astype(values.dtype.newbyteorder("<"))
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    width = _width(form)
    if width is None:
        return raw
    if form.dtype == "I8":
        shift = np.uint8(8 - width)
        signed: NDArray[np.int8] = np.left_shift(raw, shift).view(np.int8)
        extended: NDArray[np.int8] = np.right_shift(signed, np.int8(shift))
        return extended.view(np.uint8)
    masked: NDArray[np.uint8] = np.bitwise_and(raw, np.uint8((1 << width) - 1))
    return masked


def _width(form: Form) -> int | None:
    return _WIDTHS.get(form.kind) if isinstance(form.kind, str) else None


# --- the leaf that a tensor was ---------------------------------------------------------------


def check_kind(kind: Kind, dtype: str, shape: tuple[int, ...], name: str) -> None:
    """Refuse a note that contradicts its tensor."""
    word = kind[0] if isinstance(kind, list) else kind
    if word in _SCALARS:
        fits = dtype == _SCALARS[word] and shape == ((2,) if word == "complex" else ())
    elif word == "weak":
        fits = shape == () and dtype in _NUMPY
    elif word in COMPLEX128:
        fits = dtype == "F64" and (shape == (2,) if word in WEAK else shape[-1:] == (2,))
    elif word == "key":
        fits = dtype == "U32"
    else:
        fits = dtype == _NOTED.get(word)
    if not fits:
        raise FileFormatError(
            f"{shorten(name)} is noted as {word} and stored as {dtype} of shape {list(shape)}, "
            "which contradict each other"
        )


@lru_cache(maxsize=256)
def _numpy_dtype(form_dtype: str, kind: str | None) -> np.dtype[Any] | str:
    """The NumPy dtype of the values of a tensor, or why there is none."""
    word = kind if kind in _NOTED else _NUMPY.get(form_dtype)
    if kind in COMPLEX128:
        word = "complex128"
    if word is None:
        return (
            f"is of the packed dtype {form_dtype}, which has no NumPy dtype; "
            "unpack it with the program that wrote it"
        )
    try:
        return np.dtype(getattr(ml_dtypes, word, word))
    except TypeError:
        return f"is of the dtype {word}, which this ml_dtypes lacks; install a newer one"


def numpy_dtype(form: Form, name: str) -> np.dtype[Any]:
    """The NumPy dtype of the values of a tensor."""
    found = _numpy_dtype(form.dtype, form.kind if isinstance(form.kind, str) else None)
    if isinstance(found, str):
        raise FileFormatError(f"{shorten(name)} {found}")
    return found


class Logical(NamedTuple):
    """A leaf without its values: an "array", "key", "str" or a Python scalar's type."""

    kind: Literal["array", "key", "str", "int", "float", "bool", "complex"]
    dtype: np.dtype[Any] | None  # of an array
    shape: tuple[int, ...]
    weak: bool = False
    impl: str = ""  # of a key


def logical(form: Form, name: str) -> Logical:
    """What leaf a stored tensor stands for."""
    kind, shape = form.kind, form.shape
    if isinstance(kind, list):
        if kind[0] != "key":
            return Logical(kind[0], None, ())
        data = key_shape(kind[1], name)
        if shape[len(shape) - len(data) :] != data or len(shape) < len(data):
            raise FileFormatError(
                f"{shorten(name)} is noted as a key of {kind[1]}, whose data end in the shape "
                f"{list(data)}, and stored with the shape {list(shape)}"
            )
        return Logical("key", None, shape[: len(shape) - len(data)], impl=kind[1])
    if kind in _SCALARS:
        return Logical(kind, None, ())  # type: ignore[arg-type] # one of the literals
    dtype = numpy_dtype(form, name)
    return Logical("array", dtype, shape[:-1] if kind in COMPLEX128 else shape, kind in WEAK)


@lru_cache(maxsize=64)
def key_shape(impl: str, name: str) -> tuple[int, ...]:
    """The shape of the data of one key of an implementation."""
    try:
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
    except ValueError:
        raise FileFormatError(
            f"{shorten(name)} is a key of the PRNG implementation {shorten(impl)}, which this "
            "process does not know; register it, or install a newer JAX"
        ) from None
    return tuple(key.shape)


def abstract(leaf: Logical) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array or key."""
    dtype: Any = leaf.dtype
    if leaf.kind == "key":
        dtype = jax.eval_shape(lambda: jax.random.key(0, impl=leaf.impl)).dtype
    weak = {"weak_type": True} if leaf.weak and _structs_are_weak() else {}
    struct: jax.ShapeDtypeStruct = _Struct(leaf.shape, dtype, **weak)
    return struct


@lru_cache(maxsize=1)
def _structs_are_weak() -> bool:
    try:
        _Struct((), np.float32, weak_type=True)
    except TypeError:  # before JAX 0.4.34 a struct has no weak type
        return False
    return True


def from_bytes(memory: NDArray[np.uint8], form: Form, name: str, offset: int = 0) -> NDArray[Any]:
    """View the bytes of a tensor, at an offset in memory, as its values in their dtype."""
    dtype = numpy_dtype(form, name)
    shape = form.shape[:-1] if form.kind in COMPLEX128 else form.shape
    width = _width(form)
    if width is None:
        whole: NDArray[Any] = np.ndarray(shape, dtype, memory, offset)
        return whole
    raw = memory[offset : offset + form.nbytes]
    canonical = to_bytes(raw, form)
    if not np.array_equal(canonical, raw):
        raise FileFormatError(f"{shorten(name)} holds values beyond {form.kind}")
    masked: NDArray[np.uint8] = np.bitwise_and(canonical, np.uint8((1 << width) - 1))
    return masked.view(dtype).reshape(shape)


def python_value(values: NDArray[Any], form: Form) -> Any:
    """The Python scalar that a tensor stores."""
    return complex(*values.tolist()) if form.kind == "complex" else values.item()


def noted_value(form: Form) -> Any:
    """The leaf that lives in the note alone."""
    word, argument = form.kind if isinstance(form.kind, list) else ("str", "")
    return int(argument, 16) if word == "int" else argument


# --- values for a template ------------------------------------------------------------------


def rank_of(dtype: np.dtype[Any]) -> int:
    """The place of a dtype's kind in NumPy's order, those of ml_dtypes included."""
    if dtype.kind in "buifc":
        return "buifc".index(dtype.kind)
    return 1 if dtype.name.startswith("uint") else 2 if dtype.name.startswith("int") else 3


def holds_value(dtype: np.dtype[Any], value: Any) -> bool:
    """Whether a dtype has the value of a Python scalar: an integer exactly, a float rounded."""
    try:
        with np.errstate(all="ignore"):
            held = scalar_array(value, dtype)
    except (OverflowError, TypeError, ValueError):
        return False
    if rank_of(dtype) < 3:
        return bool(int(held) == value)
    found = complex(held)
    if cmath.isnan(value):
        return cmath.isnan(found)
    return cmath.isinf(found) if cmath.isinf(value) else cmath.isfinite(found)


def scalar_array(value: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A Python scalar as a 0-d array; an integer of any size goes through no other dtype."""
    return np.array(value, object if type(value) is int else None).astype(dtype)


def to_host(value: Any, dtype: np.dtype[Any] | None) -> NDArray[Any]:
    """The values of a leaf as a NumPy array, in a dtype where one is given."""
    if dtype is None:
        return host_array(value)
    if type(value) in PYTHON_SCALARS:
        return scalar_array(value, dtype)
    return host_array(value).astype(dtype, copy=False)


@lru_cache(maxsize=16)
def implementation_of(dtype: Any) -> str | None:
    """The registered name of the implementation of keys with this dtype."""
    same = (name for name in _PRNG if jax.random.key(0, impl=name).dtype == dtype)
    return next(same, None) or _implementation(_Struct((), dtype))


# --- to JAX -----------------------------------------------------------------------------------


def holds(dtype: np.dtype[Any]) -> bool:
    """Whether a jax.Array can have this dtype, here and now."""
    if dtype.char in "lLqQdD" and dtype.num < 256:  # NumPy's own, which ml_dtypes are not
        return bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined] # JAX declares no options
    return _holds(dtype)


@lru_cache(maxsize=64)
def _holds(dtype: np.dtype[Any]) -> bool:
    if dtype.kind != "V":  # one of NumPy's own
        return True
    try:
        jax.device_put(np.zeros((), dtype)).block_until_ready()
    except Exception:  # noqa: BLE001 - JAX raises whatever its backend raises
        return False
    return True


_LARGE = 1 << 16  # bytes: from here on JAX takes an aligned array over without a copy
_CHUNK = 128  # arrays in one call of the identity
_MANY = 1024  # equal arrays that make it worth compiling
_WITHOUT_PROGRAMS: Final = frozenset({"int1", "uint1"})  # JAX holds these, and compiles nothing


@jax.jit
def _identity(arrays: list[Any]) -> list[Any]:
    return arrays


def to_jax(arrays: list[NDArray[Any]]) -> list[jax.Array]:
    """Make uncommitted JAX arrays, taking over the memory of large ones.

    Creating an array costs JAX some 20 us; as the results of one compiled call, a sixth of that.
    """
    found: list[Any] = list(arrays)
    groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    alone: list[int] = []
    for position, array in enumerate(arrays):
        if array.nbytes >= _LARGE:
            alone.append(position)
        else:
            groups.setdefault((array.dtype, array.shape), []).append(position)
    values = [arrays[position] for position in alone]
    for (dtype, _), positions in groups.items():
        many = len(positions) >= _MANY and dtype.name not in _WITHOUT_PROGRAMS
        compiled = len(positions) - len(positions) % _CHUNK if many else 0
        for start in range(0, compiled, _CHUNK):
            chunk = positions[start : start + _CHUNK]
            for position, made in zip(chunk, _identity([arrays[i] for i in chunk]), strict=True):
                found[position] = made
        # Copies, as JAX may take these over too, and the memory they are in with them. Not by
        # jnp.array, which compiles a program for each shape.
        alone.extend(positions[compiled:])
        values.extend(arrays[position].copy() for position in positions[compiled:])
    for position, made in zip(alone, jax.device_put(values), strict=True):
        found[position] = made
    return found


def weaken(array: jax.Array) -> jax.Array:
    """The same 0-d array, weakly typed, where JAX has a weak type of its dtype."""
    dtype = np.dtype(array.dtype)
    for wide in (False, True):
        with _enable_x64(wide):  # which dtypes are weak depends on it
            for prototype in (0, 0.0, 0j):
                weak = jnp.asarray(prototype)
                if weak.dtype == dtype:
                    return jax.lax.full_like(weak, array)
    return array


def _enable_x64(enabled: bool) -> Any:
    experimental: Any = jax.experimental  # where it was before JAX 0.8
    return (jax if hasattr(jax, "enable_x64") else experimental).enable_x64(enabled)


def wrap_key(data: Any, impl: str) -> jax.Array:
    """The typed key array that has this data."""
    key: jax.Array = jax.random.wrap_key_data(jnp.asarray(data), impl=impl)
    return key
