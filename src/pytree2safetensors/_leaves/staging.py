"""Memory to read into: fresh for arrays on the host, a reused ring for other devices.

Specification: *Loading*.
"""

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

import jax
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._leaves.jax_versions import block_until_ready
from pytree2safetensors._leaves.to_jax import own_programs

# Measured on an H100: with fewer bytes, threads wait for room. JAX rounds pinned memory up to powers
# of two and never frees it. The missing MiB leaves room for JAX's own small arrays.
RING: Final = (63 << 20, 127 << 20, 255 << 20)  # bytes
ALIGNMENT: Final = 256  # bytes: JAX takes over memory that is aligned to 64
_PAGE: Final = 2 << 20  # bytes of a large page, which the system clears faster than many small ones


def aligned(size: int) -> NDArray[np.uint8]:
    """Return fresh memory that JAX can take over."""
    alignment = ALIGNMENT if size < 2 * _PAGE else _PAGE
    memory = np.empty(size + alignment, np.uint8)
    skip = -memory.ctypes.data % alignment
    return memory[skip : skip + size]


def default_device() -> jax.Device:
    """Return the device that JAX puts arrays on now."""
    with own_programs():
        [device] = jax.device_put(np.zeros((), np.uint8)).devices()
    return device


class Ring:
    """Memory that batches share, each after the transfers of an earlier batch ended.

    Args:
        device: The device that the memory is for.
        sizes: The bytes of its pieces; a batch lies in one of them.
    """

    def __init__(self, device: jax.Device, sizes: Sequence[int]) -> None:
        self.largest = max(sizes, default=0)
        self.pieces: list[_Piece] = []
        self.unused = deque(StartedMemory(device, size) for size in sizes)  # for more pieces
        self.taken: deque[_Piece] = deque()  # the piece of each batch, the oldest first
        self.moving: deque[list[Any]] = deque()  # the arrays that are made of the oldest batches

    def take(self, size: int) -> NDArray[np.uint8] | None:
        """Return memory for a batch, or None while the ring is full."""
        # At least one unit: an empty batch would make a full piece look free.
        size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        for piece in self._pieces():
            start = piece.place(size)
            if start is not None:
                piece.taken.append((start, size))
                self.taken.append(piece)
                return piece.memory[start : start + size]
        return None

    def _pieces(self) -> Iterator["_Piece"]:
        yield from self.pieces
        while self.unused:
            self.pieces.append(_Piece(self.unused.popleft().get()))
            yield self.pieces[-1]

    def transferred(self, arrays: list[Any]) -> None:
        """Record which arrays are made of the oldest batch that is not being transferred yet."""
        self.moving.append(arrays)

    def release(self) -> None:
        """Wait until the oldest batch has been transferred, and free its memory for others."""
        block_until_ready(self.moving.popleft())
        self.taken.popleft().taken.popleft()


class _Piece:
    """Memory in one piece, and which parts of it are in use."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self.memory = memory
        self.taken: deque[tuple[int, int]] = deque()  # where each batch starts, and its bytes

    def place(self, size: int) -> int | None:
        """Return the offset of this number of free bytes; None if there are not enough."""
        if not self.taken:
            return 0 if size <= len(self.memory) else None
        first, (last, length) = self.taken[0][0], self.taken[-1]
        end = last + length
        if last >= first:  # the bytes after the last batch and those before the first are free
            if end + size <= len(self.memory):
                return end
            return 0 if size <= first else None
        return end if end + size <= first else None


class StartedMemory:
    """Memory to transfer to a device from, pinned if possible; JAX allocates it in the background."""

    def __init__(self, device: jax.Device, size: int) -> None:
        self.size, self.owner = size, _start_pinning(device, size)

    def get(self) -> NDArray[np.uint8]:
        """Wait for the memory."""
        pinned = None if self.owner is None else _pinned_memory(self.owner)
        return aligned(self.size) if pinned is None else pinned


def _start_pinning(device: jax.Device, size: int) -> Any:
    """Start to allocate host memory that a device reads without a further copy; None if it has none.

    JAX has no function for this. So a JAX array is created there, for `_pinned_memory`.
    """
    try:
        sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        return jax.device_put(np.zeros(size, np.uint8), sharding)
    except Exception:  # noqa: BLE001 - backends and versions without it differ in what they raise
        return None


def _pinned_memory(owner: Any) -> NDArray[np.uint8] | None:
    """Return the writable memory of an array that `_start_pinning` made; None if it failed."""
    try:
        # Wait, because the zeros must not arrive after the data that are read into the memory.
        address = block_until_ready(owner).unsafe_buffer_pointer()
    except Exception:  # noqa: BLE001 - as above
        return None
    buffer: Any = (ctypes.c_uint8 * owner.size).from_address(address)
    buffer.owner = owner  # the NumPy array keeps the buffer alive, and the buffer keeps the memory
    return np.frombuffer(buffer, np.uint8)
