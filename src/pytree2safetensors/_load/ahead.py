"""Batches that are read while others become leaves, and the memory that they are read into.

Specification: *Loading*.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._collector import collector_paused
from pytree2safetensors._leaves.jax_versions import block_until_ready
from pytree2safetensors._leaves.staging import ALIGNMENT, RING, Ring, StartedMemory, aligned
from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.eager import check_interrupt
from pytree2safetensors._load.finishing import Finisher
from pytree2safetensors._load.ranges import Place, plan_reads
from pytree2safetensors._load.slots import Batch
from pytree2safetensors._load.verifying import check_digests
from pytree2safetensors._storage.progress import Report
from pytree2safetensors._storage.read_pool import ReadPool
from pytree2safetensors._storage.threads import Task

_AHEAD: Final = 16  # batches to read while another becomes leaves: with few, threads are idle
_AHEAD_REMOTELY: Final = 5  # so that enough ranges are requested at the same time


class _Reading(NamedTuple):
    """A batch that is being read."""

    places: list[Place]
    futures: list[Task[None]]
    is_staged: bool

    def is_read(self) -> bool:
        """Return whether nothing is left to wait for."""
        return all(future.done() for future in self.futures)


class Ahead:
    """Batches that are read while others become leaves; their memory becomes that of the leaves."""

    def __init__(self, checkpoint: OpenCheckpoint, finisher: Finisher, pool: ReadPool) -> None:
        self.checkpoint, self.finisher, self.pool = checkpoint, finisher, pool
        self.window: deque[_Reading] = deque()

    def start(self, batch: Batch, report: Report) -> None:
        """Start to read a batch. Only its reading refers to its memory, and then its leaves."""
        memory = self.memory(batch.size)
        with collector_paused():
            places = list(_places(batch, memory, self.finisher))
            reads, tasks = plan_reads(self.checkpoint, places, report.add)
        self.started(places, self.pool.start(reads, tasks, report.add))

    def memory(self, size: int) -> NDArray[np.uint8]:
        """Return memory to read a batch into."""
        while len(self.window) > (_AHEAD_REMOTELY if self.checkpoint.in_flight else _AHEAD):
            self.finish()
        return aligned(size)

    def started(self, places: list[Place], futures: list[Task[None]]) -> None:
        """Remember a batch that is being read."""
        self.window.append(_Reading(places, futures, is_staged=False))

    def finish(self) -> list[Any]:
        """Make leaves of the oldest batch; return the arrays that are made of its memory."""
        places, futures, is_staged = self.window.popleft()
        for future in futures:
            future.result()
        check_interrupt()
        check_digests(self.checkpoint, places, self.pool)
        return self.finisher.finish(places, is_staged=is_staged)


class Staged(Ahead):
    """The same for other devices. The memory is a ring, which is reused.

    A batch that is larger than the ring has memory of its own, and is read while nothing else is.
    """

    def __init__(
        self,
        checkpoint: OpenCheckpoint,
        finisher: Finisher,
        pool: ReadPool,
        device: jax.Device,
        batches: Sequence[Batch],
    ) -> None:
        super().__init__(checkpoint, finisher, pool)
        self.device, self.ring = device, Ring(device, _ring_sizes(batches))
        self.large: list[Any] = []  # made of the last batch that is larger than the ring
        self.is_large = False

    def memory(self, size: int) -> NDArray[np.uint8]:
        self.is_large = size > self.ring.largest
        if self.is_large:
            while self.window:
                self.finish()
            block_until_ready(self.large)  # only one of these is in memory
            self.large = []
            return StartedMemory(self.device, size).get()
        while len(self.window) > _AHEAD:  # what has memory of its own takes little of the ring
            self.finish()
        while (memory := self.ring.take(size)) is None:
            # Finished batches are handed over first, so that the link is always busy.
            if self.window and (self.window[0].is_read() or not self.ring.moving):
                self.finish()
            else:
                self.ring.release()
        return memory

    def started(self, places: list[Place], futures: list[Task[None]]) -> None:
        self.window.append(_Reading(places, futures, not self.is_large))
        while self.window and self.window[0].is_read():
            self.finish()

    def finish(self) -> list[Any]:
        is_staged = self.window[0].is_staged
        arrays = super().finish()
        if not is_staged:
            self.large = arrays
            return arrays
        self.ring.transferred(arrays)
        if _are_ready(self.large):  # a leaf by rules is another array
            self.large = []
        return arrays


def _are_ready(arrays: Sequence[Any]) -> bool:
    return all(array.is_ready() for array in arrays)


def _ring_sizes(batches: Sequence[Batch]) -> Sequence[int]:
    """Return how large a ring the batches need: that of RING, or a smaller one that holds them all."""
    total = sum(batch.size + ALIGNMENT for batch in batches)
    return RING if total > max(RING) else (total,)


def _places(batch: Batch, memory: NDArray[np.uint8], finisher: Finisher) -> Iterator[Place]:
    for slot in batch.slots:
        if slot.offset < 0:
            yield Place(slot, *finisher.memory_for(slot))
        else:
            yield Place(slot, memory, slot.offset)
