"""The bytes of tensors, in little memory: batches of them are read in advance.

A batch has small tensors, and pieces of large ones.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._load.checkpoint import OpenCheckpoint
from pytree2safetensors._load.ranges import Reads, in_file_order
from pytree2safetensors._storage.byte_source import PIECE, ByteSource
from pytree2safetensors._storage.read_pool import ReadPool
from pytree2safetensors._storage.threads import Task

_BATCH: Final = 2 * PIECE  # bytes: more than those that the caller of a pool reads itself
_AHEAD: Final = 4  # batches to request from a store while another is looked at

Pieces: TypeAlias = Iterator[NDArray[np.uint8]]


@contextmanager
def contents(
    checkpoint: OpenCheckpoint, names: Iterable[str]
) -> Iterator[Iterator[tuple[str, Pieces]]]:
    """Give the names of tensors with their bytes, in pieces of `PIECE` bytes.

    All pieces of a tensor must be taken before the next tensor.

    Raises:
        FileFormatError: The file changed.
        OSError: The file cannot be read.
    """
    with ReadPool(checkpoint.in_flight or 1) as pool:
        yield _tensors(checkpoint, list(names), pool)


def _tensors(
    checkpoint: OpenCheckpoint, names: Sequence[str], pool: ReadPool
) -> Iterator[tuple[str, Pieces]]:
    pieces = _pieces(checkpoint, names, pool)
    for name in names:
        yield name, islice(pieces, -(-checkpoint.infos[name].nbytes // PIECE))


def _pieces(checkpoint: OpenCheckpoint, names: Iterable[str], pool: ReadPool) -> Pieces:
    ahead = _AHEAD if checkpoint.in_flight else 1
    window: deque[_Batch] = deque()
    for batch in _batches(checkpoint, names):
        batch.start(pool)
        window.append(batch)
        if len(window) > ahead:
            yield from window.popleft().pieces()
    while window:  # pragma: no branch - nobody asks for more than the last piece
        yield from window.popleft().pieces()


def _batches(checkpoint: OpenCheckpoint, names: Iterable[str]) -> Iterator["_Batch"]:
    batch = _Batch()
    for name in names:
        source, start = checkpoint.places[name]
        stop = start + checkpoint.infos[name].nbytes
        for offset in range(start, stop, PIECE):
            size = min(PIECE, stop - offset)
            if batch.size + size > _BATCH:
                yield batch
                batch = _Batch()
            batch.add(source, offset, size)
    yield batch


class _Batch:
    """Pieces that are read together."""

    def __init__(self) -> None:
        self.memory = np.empty(_BATCH, np.uint8)
        self.reads, self.sizes, self.size = Reads(), list[int](), 0
        self.futures: list[Task[None]] = []

    def add(self, source: ByteSource, offset: int, size: int) -> None:
        """Add a piece."""
        self.reads.add(source, offset, self.memory, self.size, size)
        self.sizes.append(size)
        self.size += size

    def start(self, pool: ReadPool) -> None:
        """Start to read."""
        self.futures = pool.start(in_file_order(self.reads.all()), (), lambda _: None)

    def pieces(self) -> Pieces:
        """Wait for the pieces, and yield them in the order in which they were added."""
        for future in self.futures:
            future.result()
        start = 0
        for size in self.sizes:
            yield self.memory[start : start + size]
            start += size
