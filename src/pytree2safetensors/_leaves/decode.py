"""Decoding: the values that bytes stand for.

Specification: *Loading*.
"""

import cmath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import FileFormatError, shorten
from pytree2safetensors._format.tensor import COMPLEX128, TensorInfo
from pytree2safetensors._leaves.describe import PYTHON_SCALARS
from pytree2safetensors._leaves.encode import canonical_bools, host_array, to_bytes, width_of
from pytree2safetensors._leaves.spec import numpy_dtype, rank_of


def from_bytes(
    memory: NDArray[np.uint8], info: TensorInfo, name: str, offset: int = 0
) -> NDArray[Any]:
    """View the bytes of a tensor, at an offset in memory, as its values in their dtype."""
    dtype = numpy_dtype(info, name)
    shape = info.shape[:-1] if info.kind in COMPLEX128 else info.shape
    width = width_of(info)
    if width is None:
        whole: NDArray[Any] = np.ndarray(shape, dtype, memory, offset)
        return canonical_bools(whole)
    raw = memory[offset : offset + info.nbytes]
    canonical = to_bytes(raw, info)
    if not np.array_equal(canonical, raw):
        raise FileFormatError(f"{shorten(name)} holds values beyond {info.kind}")
    masked: NDArray[np.uint8] = np.bitwise_and(canonical, np.uint8((1 << width) - 1))
    return masked.view(dtype).reshape(shape)


def python_value(values: NDArray[Any], info: TensorInfo) -> Any:
    """The Python scalar that a tensor stores."""
    return complex(*values.tolist()) if info.kind == "complex" else values.item()


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
