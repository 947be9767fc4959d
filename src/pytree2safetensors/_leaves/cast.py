"""Conversion of values to other dtypes, and which Python scalars a dtype can hold.

Specification: *Loading into a template*.
"""

import cmath
import math
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._leaves.describe import PYTHON_SCALARS
from pytree2safetensors._leaves.host import host_array
from pytree2safetensors._leaves.spec import rank_of


def holds_value(dtype: np.dtype[Any], value: Any) -> bool:
    """Return whether a dtype can hold a Python scalar: integers exactly, floats rounded."""
    try:
        held = _scalar_array(value, dtype)
    except (OverflowError, TypeError, ValueError):
        return False
    if rank_of(dtype) < 3:
        return bool(int(held) == value)
    found = complex(held)
    if cmath.isnan(value):
        return cmath.isnan(found)
    if cmath.isinf(value):
        return cmath.isinf(found)
    bound = _bound(dtype)
    return cmath.isfinite(found) and (bound == math.inf or abs(value) < bound)


@cache
def _bound(dtype: np.dtype[Any]) -> float:
    """Return the magnitude that is too large for a dtype without infinity and NaN; infinity for others."""
    if not cmath.isfinite(_scalar_array(math.inf, dtype)):
        return math.inf
    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call] # ml_dtypes gives it no types
    largest = float(info.max)
    _, exponent = math.frexp(largest)
    return largest + math.ldexp(float(info.eps), exponent - 2)  # half a step


def _scalar_array(value: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Convert a Python scalar to a 0-d array of a dtype."""
    # NumPy makes large ints np.ulonglong, whose dtype equals that of np.uint64.
    return cast_array(np.array(value), dtype).view(dtype)


def to_host(value: Any, dtype: np.dtype[Any] | None) -> NDArray[Any]:
    """Convert the values of a leaf to a NumPy array, of a dtype if one is given."""
    if dtype is not None and type(value) in PYTHON_SCALARS:
        return _scalar_array(value, dtype)
    return cast_array(host_array(value), dtype)


def cast_array(values: NDArray[Any], dtype: np.dtype[Any] | None) -> NDArray[Any]:
    """Convert values to a dtype if one is given, without warnings about lost values.

    NumPy and ml_dtypes convert them: integers wrap, floats overflow, and a wide dtype may become a
    narrow one through a dtype in between, which rounds twice.
    """
    if dtype is None or values.dtype == dtype:
        return values
    with np.errstate(all="ignore"):
        try:
            return values.astype(dtype)
        except TypeError:  # ml_dtypes has no conversion between some dtypes of at most a byte
            return values.astype(np.float32).astype(dtype)
