"""Values: the bytes of an array, the array of bytes, and JAX's own arrays of both."""

import cmath
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import FileFormatError, shorten
from pytree2safetensors._leaf import (
    COMPLEX128,
    NUMPY,
    PYTHON_SCALARS,
    SCALARS,
    WIDTHS,
    Form,
    is_key_dtype,
    numpy_dtype,
    rank_of,
)

# --- to bytes ---------------------------------------------------------------------------------


def host_array(leaf: Any) -> NDArray[Any]:
    """The values of a leaf that has a tensor, without a copy where the host holds them."""
    kind = type(leaf)
    if kind is complex:
        return np.array([leaf.real, leaf.imag])
    if kind in PYTHON_SCALARS:
        return np.array(leaf, NUMPY[SCALARS[kind.__name__]])
    if isinstance(leaf, np.ndarray | np.generic):
        return _canonical(np.asarray(leaf))
    if is_key_dtype(leaf.dtype):
        leaf = _key_data(leaf)
    if len(leaf.sharding.device_set) == 1:
        return host_shard(leaf)
    if leaf.is_fully_replicated:
        return host_shard(leaf.addressable_data(0))
    if not leaf.is_fully_addressable:
        return np.asarray(leaf)  # which JAX refuses
    whole = np.empty(leaf.shape, leaf.dtype)  # unlike np.asarray, leaves no copy inside the leaf
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = host_shard(shard.data)
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
    """The values of an array on one device; a large copy that this takes is not kept inside it."""
    if is_key_dtype(data.dtype):
        data = _key_data(data)
    if data.nbytes >= TAKEN_OVER and not _is_on_host(data):
        # Another array of the same memory, in which the copy stays instead.
        data = jax.make_array_from_single_device_arrays(data.shape, data.sharding, [data])
    return np.asarray(data)


def _key_data(keys: jax.Array) -> jax.Array:
    with jax.ensure_compile_time_eval():  # it has values, whatever is traced around this
        return jax.random.key_data(keys)


def _is_on_host(data: jax.Array) -> bool:
    """Whether the host can read an array where it is; types of a byte or less may be packed."""
    device: Any = next(iter(data.sharding.device_set))
    return device.platform == "cpu" and not (data.dtype.kind == "V" and data.dtype.itemsize == 1)


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
    return WIDTHS.get(form.kind) if isinstance(form.kind, str) else None


# --- from bytes -------------------------------------------------------------------------------


def from_bytes(memory: NDArray[np.uint8], form: Form, name: str, offset: int = 0) -> NDArray[Any]:
    """View the bytes of a tensor, at an offset in memory, as its values in their dtype."""
    dtype = numpy_dtype(form, name)
    shape = form.shape[:-1] if form.kind in COMPLEX128 else form.shape
    width = _width(form)
    if width is None:
        whole: NDArray[Any] = np.ndarray(shape, dtype, memory, offset)
        return _canonical(whole)
    raw = memory[offset : offset + form.nbytes]
    canonical = to_bytes(raw, form)
    if not np.array_equal(canonical, raw):
        raise FileFormatError(f"{shorten(name)} holds values beyond {form.kind}")
    masked: NDArray[np.uint8] = np.bitwise_and(canonical, np.uint8((1 << width) - 1))
    return masked.view(dtype).reshape(shape)


def _canonical(values: NDArray[Any]) -> NDArray[Any]:
    """The same values, booleans as the bytes 0 and 1: to JAX any other is neither true nor false."""
    if values.dtype.kind != "b" or not values.size or values.view(np.uint8).max() <= 1:
        return values
    return np.asarray(values.view(np.uint8) != 0)


def python_value(values: NDArray[Any], form: Form) -> Any:
    """The Python scalar that a tensor stores."""
    return complex(*values.tolist()) if form.kind == "complex" else values.item()


# --- for a template ---------------------------------------------------------------------------


def holds_value(dtype: np.dtype[Any], value: Any) -> bool:
    """Whether a dtype has the value of a Python scalar: an integer exactly, a float rounded."""
    try:
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
    return cast_array(np.array(value, object if type(value) is int else None), dtype)


def to_host(value: Any, dtype: np.dtype[Any] | None) -> NDArray[Any]:
    """The values of a leaf as a NumPy array, in a dtype where one is given."""
    if dtype is not None and type(value) in PYTHON_SCALARS:
        return scalar_array(value, dtype)
    return cast_array(host_array(value), dtype)


def cast_array(values: NDArray[Any], dtype: np.dtype[Any] | None) -> NDArray[Any]:
    """The values in the dtype that is asked for, if one is: what that loses is no warning."""
    if dtype is None or values.dtype == dtype:
        return values
    with np.errstate(all="ignore"):
        return values.astype(dtype)


# --- to JAX -----------------------------------------------------------------------------------


TAKEN_OVER: Final = 1 << 12  # bytes: from here on JAX gets the memory itself, and no copy of it
_CHUNK = 128  # arrays in one call of the identity
_MANY = 1024  # equal arrays that make it worth compiling
_WITHOUT_PROGRAMS: Final = frozenset({"int1", "uint1"})  # JAX holds these, and compiles nothing


@jax.jit
def _identity(arrays: list[Any]) -> list[Any]:
    return arrays


def to_jax(arrays: list[NDArray[Any]]) -> list[jax.Array]:
    """Make uncommitted JAX arrays, taking over the memory of large ones.

    Creating an array costs JAX some 20 us; as the results of one compiled call, a fifth to a sixth.
    """
    found: list[Any] = list(arrays)
    groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    alone: list[int] = []
    for position, array in enumerate(arrays):
        if array.nbytes >= TAKEN_OVER:
            alone.append(position)
        else:
            groups.setdefault((array.dtype, array.shape), []).append(position)
    values = [arrays[position] for position in alone]
    with own_programs():
        for (dtype, _), positions in groups.items():
            many = len(positions) >= _MANY and dtype.name not in _WITHOUT_PROGRAMS
            compiled = len(positions) - len(positions) % _CHUNK if many else 0
            for start in range(0, compiled, _CHUNK):
                chunk = positions[start : start + _CHUNK]
                made = _identity([arrays[i] for i in chunk])
                for position, array in zip(chunk, made, strict=True):
                    found[position] = array
            # Copies, as JAX may take these over too, and the memory they are in with them. Not by
            # jnp.array, which compiles a program for each shape.
            alone.extend(positions[compiled:])
            values.extend(arrays[position].copy() for position in positions[compiled:])
    for position, array in zip(alone, jax.device_put(values), strict=True):
        found[position] = array
    return found


@contextmanager
def own_programs() -> Iterator[None]:
    """Let JAX run the programs of a load, whatever it is told to watch for or to do elsewhere.

    NaNs and transfers are what a load is about, not what a user looks for when he looks for them.
    Without jit a program may give its arguments back, which are no arrays of JAX, and under a mesh
    it spreads its results over the devices.
    """
    with (
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.transfer_guard("allow"),
        jax.disable_jit(False),
        _no_mesh(),
    ):
        yield


@contextmanager
def _no_mesh() -> Iterator[None]:
    sharding: Any = jax.sharding
    current = getattr(sharding, "get_abstract_mesh", None)  # JAX 0.5.0 lacks it, and older ones
    with ExitStack() as stack:
        if current is not None and not current().empty:
            enter = getattr(jax, "set_mesh", None) or sharding.use_mesh  # its name before JAX 0.8
            with suppress(ValueError):  # a trace keeps the mesh that it began with
                stack.enter_context(enter(sharding.Mesh(np.empty((), object), ())))
        yield


def weaken(array: jax.Array) -> jax.Array:
    """The same 0-d array, weakly typed, where JAX has a weak type of its dtype."""
    dtype = np.dtype(array.dtype)
    for wide in (False, True):
        with _enable_x64(wide), own_programs():  # which dtypes are weak depends on the former
            if dtype == np.bool_:  # which only comparisons make
                return jax.lax.ne(jax.lax.full_like(0, array), jax.lax.full_like(0, 0))
            for prototype in (0, 0.0, 0j):
                if jnp.result_type(prototype) == dtype:
                    return jax.lax.full_like(prototype, array)
    return array


def _enable_x64(enabled: bool) -> Any:
    experimental: Any = jax.experimental  # where it was before JAX 0.8
    return (jax if hasattr(jax, "enable_x64") else experimental).enable_x64(enabled)


def wrap_key(data: Any, impl: str) -> jax.Array:
    """The typed key array that has this data."""
    with own_programs():
        key: jax.Array = jax.random.wrap_key_data(jnp.asarray(data), impl=impl)
    return key
