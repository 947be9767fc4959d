"""Memory for what is read: fresh for arrays on the host, a ring that is used again for other devices.

Specification: *Loading*.
"""

from collections import deque
from typing import Any, Final

import jax
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._leaves.jax_versions import block_until_ready, pinned_memory
from pytree2safetensors._leaves.to_jax import own_programs

# Measured on an H100: 256 MiB in pinned memory, in batches of 32 MiB that 12 or more threads read,
# reach 80 % of what the page cache gives. JAX's pool of pinned memory grows by powers of two.
RING: Final = 256 << 20  # bytes
ALIGNMENT: Final = 256  # bytes: JAX takes over memory that is aligned to 64


def aligned(size: int) -> NDArray[np.uint8]:
    """Return fresh memory that JAX can take over."""
    memory = np.empty(size + ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % ALIGNMENT
    return memory[skip : skip + size]


def default_device() -> jax.Device:
    """Return the device that JAX puts arrays on now."""
    with own_programs():
        [device] = jax.device_put(np.zeros((), np.uint8)).devices()
    return device


class Ring:
    """Memory that batches take in turns, each after the transfers of the batch before it ended."""

    def __init__(self, device: jax.Device, size: int = RING) -> None:
        pinned = pinned_memory(device, size)
        self.memory = aligned(size) if pinned is None else pinned
        self.taken: deque[tuple[int, int]] = deque()  # where each batch starts, and its bytes
        self.moving: deque[list[Any]] = deque()  # the arrays that are made of the oldest batches

    def take(self, size: int) -> NDArray[np.uint8] | None:
        """Return memory for a batch; None if batches that were not transferred yet fill the ring."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        while (start := self._place(size)) is None:
            if not self.moving:
                return None
            block_until_ready(self.moving.popleft())
            self.taken.popleft()
        self.taken.append((start, size))
        return self.memory[start : start + size]

    def _place(self, size: int) -> int | None:
        """Return where so many bytes are free in one piece; None if nowhere."""
        if not self.taken:
            return 0 if size <= len(self.memory) else None
        first, (last, length) = self.taken[0][0], self.taken[-1]
        end = last + length
        if last >= first:  # free are the bytes after the last, and those before the first
            if end + size <= len(self.memory):
                return end
            return 0 if size <= first else None
        return end if end + size <= first else None

    def transferred(self, arrays: list[Any]) -> None:
        """Say which arrays are made of the oldest batch that is not being transferred yet."""
        self.moving.append(arrays)
