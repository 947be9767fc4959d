"""Encoding: from values to bytes.

Specification: *Leaves*.
"""

import sys
from collections.abc import Iterator
from typing import Any, Final

import jax
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._format.tensor import WIDTHS, TensorInfo
from pytree2safetensors._leaves.host import host_array


def joined_bytes(leaves: list[Any], infos: list[TensorInfo]) -> bytes:
    """Join the bytes of small tensors."""
    single = jax.sharding.SingleDeviceSharding
    parts = [
        leaf
        if info.kind is None
        and info.dtype in _BUFFERS
        and type(getattr(leaf, "sharding", None)) is single
        else _small_bytes(leaf, info)
        for leaf, info in zip(leaves, infos, strict=True)
    ]
    try:
        return b"".join(parts)
    except TypeError:  # an array on another device or in another layout has no buffer
        return b"".join(map(_small_bytes, leaves, infos))


def _small_bytes(leaf: Any, info: TensorInfo) -> bytes:
    return b"".join(memoryview(piece) for piece in pieces(host_array(leaf), info))  # type: ignore[arg-type] # before 3.12 no type says buffer


# Dtypes for which the buffer of a JAX array has the bytes of the file. Those of booleans may be others.
_BUFFERS: Final = frozenset(
    {"U8", "I8", "U16", "I16", "F16", "U32", "I32", "F32", "C64", "U64", "I64", "F64"}
    if sys.byteorder == "little"
    else ()
)


_PIECE = 1 << 22


def pieces(values: NDArray[Any], info: TensorInfo) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tensor in order, in one piece if this needs no copy."""
    plain = _plain(values, info)
    if values.flags.c_contiguous and plain:
        yield values.reshape(-1).view(np.uint8)
        return
    pending = [values]
    while pending:
        part = pending.pop()
        if part.nbytes <= _PIECE:
            yield to_bytes(part, info)
        else:
            rows = max(1, _PIECE * len(part) // part.nbytes) if len(part) > 1 else 0
            if not rows:
                pending.append(part[0])
            else:
                starts = range(0, len(part), rows)
                pending.extend(part[start : start + rows] for start in reversed(starts))


def _plain(values: NDArray[Any], info: TensorInfo) -> bool:
    return width_of(info) is None and values.dtype.newbyteorder("<") == values.dtype


def to_bytes(values: NDArray[Any], info: TensorInfo) -> NDArray[np.uint8]:
    """Convert values to bytes: little-endian, row-major and canonical."""
    if not _plain(values, info) and width_of(info) is None:
        values = values.astype(values.dtype.newbyteorder("<"))
    raw = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    width = width_of(info)
    if width is None:
        return raw
    if info.dtype == "I8":
        shift = np.uint8(8 - width)
        signed: NDArray[np.int8] = np.left_shift(raw, shift).view(np.int8)
        extended: NDArray[np.int8] = np.right_shift(signed, np.int8(shift))
        return extended.view(np.uint8)
    masked: NDArray[np.uint8] = np.bitwise_and(raw, np.uint8((1 << width) - 1))
    return masked


def width_of(info: TensorInfo) -> int | None:
    """Return the bits of a value that does not fill its byte; None for other tensors."""
    return WIDTHS.get(info.kind) if isinstance(info.kind, str) else None
