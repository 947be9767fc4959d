"""Strategies for arrays: every dtype from raw bytes, in every layout."""

import math
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import jax
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from numpy.typing import NDArray

from pytree2safetensors._arguments import checked
from pytree2safetensors._leaves.describe import info_of
from pytree2safetensors._leaves.spec import jax_holds
from pytree2safetensors.testing._compare import VALUE_BITS

Draw: TypeAlias = Callable[..., Any]  # Hypothesis's own type cannot be checked at run time

# Files cannot hold these: longdoubles, half-precision complex numbers, and dtypes that are not
# numbers.
_NAMES: Final = (
    "float32", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float64", "complex64", "complex128", "bfloat16", "float8_e3m4", "float8_e4m3",
    "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    "float8_e8m0fnu", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "int1", "int2", "int4",
    "uint1", "uint2", "uint4",
)  # fmt: skip


def _known(name: str) -> bool:
    try:
        np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:  # pragma: no cover - this version of ml_dtypes does not have it
        return False
    return True


# Every dtype that a file can hold and the installed ml_dtypes has.
DTYPES: Final = tuple(np.dtype(getattr(ml_dtypes, name, name)) for name in _NAMES if _known(name))
# Bytes that give extreme signs, exponents and mantissas: NaNs with and without payloads,
# infinities, subnormals, zeros of both signs, the largest and smallest integers.
_EDGES: Final = bytes([0x00, 0x01, 0x7F, 0x80, 0xFF, 0x7C, 0xF0, 0xC0] * 32)


def values_of(dtype: np.dtype[Any], count: int, raw: bytes, edges: bool) -> NDArray[Any]:
    """Repeat bytes to fill a number of elements, in new memory."""
    if edges:
        raw = raw.translate(_EDGES)
    filled = np.resize(np.frombuffer(raw, np.uint8), count * dtype.itemsize)
    if dtype.name in VALUE_BITS:
        filled &= np.uint8(VALUE_BITS[dtype.name])
    return filled.view(dtype)


def _unaligned(values: NDArray[Any]) -> NDArray[Any]:
    return np.frombuffer(b"\0" + values.tobytes(), values.dtype, offset=1).reshape(values.shape)


def _big_endian(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.isbuiltin != 1:  # ml_dtypes has only native byte orders
        return values
    return values.view(values.dtype.newbyteorder(">"))


def _read_only(values: NDArray[Any]) -> NDArray[Any]:
    values.flags.writeable = False
    return values


def _fortran(values: NDArray[Any]) -> NDArray[Any]:
    return np.array(values, order="F")


def _transposed(values: NDArray[Any]) -> NDArray[Any]:
    """Swap the last two axes in memory."""
    if values.ndim < 2:
        return values
    *axes, rows, columns = values.shape
    swapped: NDArray[Any] = values.reshape(*axes, columns, rows).swapaxes(-1, -2)
    return swapped


def _reversed(values: NDArray[Any]) -> NDArray[Any]:
    return values[::-1] if values.ndim else values


def _strided(values: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(values, 2, axis=-1)[..., ::2] if values.ndim else values


def _repeated(values: NDArray[Any]) -> NDArray[Any]:
    return np.broadcast_to(values[:1], values.shape) if values.ndim else values


def _scalar(values: NDArray[Any]) -> Any:
    return values[()]


def _jax_array(values: NDArray[Any]) -> Any:
    native = values.dtype.newbyteorder("=")  # JAX has no other
    return jax.device_put(values.astype(native)) if jax_holds(native) else values


_LAYOUTS: Final[tuple[Callable[[NDArray[Any]], Any], ...]] = (
    _jax_array,
    np.asarray,
    _jax_array,  # twice, because most saved arrays have these
    _fortran,
    _transposed,
    _reversed,
    _strided,
    _repeated,
    _read_only,
    _unaligned,
    _big_endian,
    _scalar,
)


def _shape(number: int) -> tuple[int, ...]:
    """Return the shape with this number, of up to four axes of up to four elements."""
    number, axes = divmod(number, 5)
    return tuple(number // 5**axis % 5 for axis in range(axes))


# Drawn from one number, like names. Larger shapes are left out, because they would only take longer.
_SHAPES: Final = st.integers(0, 5**5 - 1).map(_shape)


@checked
def arrays(
    dtypes: SearchStrategy[Any] | None = None,
    *,
    shapes: SearchStrategy[tuple[int, ...]] = _SHAPES,
) -> SearchStrategy[Any]:
    """Generate arrays of every dtype from raw bytes, as `jax.Array`s and as NumPy arrays.

    Each array has the shape and the dtype that were drawn; only its byte order may be another one.

    The NumPy arrays are in C or Fortran order, transposed in memory, reversed, strided, broadcast
    from the first index of their first axis, read-only, unaligned or big-endian. Some 0-d ones are
    scalars. The JAX arrays are on the default device. They only have dtypes that JAX supports:
    without `jax_enable_x64`, arrays of int64, uint64, float64 and complex128 are NumPy arrays.

    Args:
        dtypes: A strategy for NumPy dtypes, or for what `numpy.dtype` takes; every dtype by default. A
            file must be able to hold them.
        shapes: A strategy for shapes; by default small ones, including 0-d and empty arrays.

    Raises:
        ValueError: A file cannot hold a dtype that was drawn.
        TypeError: What was drawn is not a dtype or not a shape.

    Specification: *Leaves*.

    >>> from hypothesis import given
    >>> from hypothesis import strategies as st
    >>> @given(arrays(st.just("float32"), shapes=st.just((2, 3))))
    ... def test_shape(array):
    ...     assert array.shape == (2, 3)
    >>> test_shape()
    """
    return _arrays(dtypes, shapes)


@st.composite
def _arrays(
    draw: Draw, dtypes: SearchStrategy[Any] | None, shapes: SearchStrategy[tuple[int, ...]]
) -> Any:
    dtype = np.dtype(draw(st.sampled_from(DTYPES) if dtypes is None else dtypes))
    if info_of(dtype, ()) is None:
        raise ValueError(f"a file cannot hold the dtype {dtype}")
    shape = draw(shapes)
    if not isinstance(shape, tuple):
        raise TypeError(f"arrays: shapes must generate tuples of ints, not {type(shape).__name__}")
    # Longer arrays repeat these bytes.
    count = math.prod(shape)
    size = max(1, min(32, count * dtype.itemsize))
    raw = draw(st.binary(min_size=size, max_size=size))
    values = values_of(dtype, count, raw, draw(st.booleans())).reshape(shape)
    return draw(st.sampled_from(_LAYOUTS))(values)
