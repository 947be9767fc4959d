"""Decoding: from bytes to values.

Specification: *Leaves*.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._format.tensor import TensorInfo
from pytree2safetensors._leaves.encode import to_bytes, width_of
from pytree2safetensors._leaves.host import canonical_bools
from pytree2safetensors._leaves.spec import numpy_dtype
from pytree2safetensors._messages import shorten


def from_bytes(
    memory: NDArray[np.uint8], info: TensorInfo, name: str, offset: int = 0
) -> NDArray[Any]:
    """View the bytes of a tensor at an offset in memory as its values."""
    dtype = numpy_dtype(info, name)
    width = width_of(info)
    if width is None:
        whole: NDArray[Any] = np.ndarray(info.array_shape, dtype, memory, offset)
        return canonical_bools(whole)
    raw = memory[offset : offset + info.nbytes]
    canonical = to_bytes(raw, info)
    if not np.array_equal(canonical, raw):
        raise FileFormatError(f"{shorten(name)} has values that are not {info.kind}")
    masked: NDArray[np.uint8] = np.bitwise_and(canonical, np.uint8((1 << width) - 1))
    return masked.view(dtype).reshape(info.array_shape)


def rows_of(
    memory: NDArray[np.uint8], info: TensorInfo, name: str, start: int, step: int, count: int
) -> NDArray[Any]:
    """View equal plain tensors as the rows of one array. In memory, they start `step` bytes apart."""
    dtype = np.dtype((numpy_dtype(info, name), info.shape))
    rows: NDArray[Any] = np.ndarray(count, dtype, memory, start, step)
    return canonical_bools(rows)


def python_value(values: NDArray[Any], info: TensorInfo) -> Any:
    """Return the Python scalar in a tensor."""
    return complex(*values.tolist()) if info.kind == "complex" else values.item()
