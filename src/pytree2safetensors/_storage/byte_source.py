"""Sources of bytes, and reads of many ranges."""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import unread

PIECE: Final = 8 << 20  # bytes of one read; a multiple of every item size
_VECTORS: Final = 512  # buffers of one system call; every system allows 1024


class ByteSource:
    """A file to read at any position, from any thread.

    Attributes:
        piece: The bytes of one read; 0 if the caller decides.
        gap: Two ranges of a tensor with fewer bytes between them are read as one.
        in_flight: How many reads to have in progress; 0 if the number of cores decides.
    """

    piece: int = 0
    gap: int = 1 << 14
    in_flight: int = 0

    def __init__(self, label: str, size: int) -> None:
        self.label, self.size = label, size

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        """Read into buffers in order, and return how many bytes arrived."""
        raise NotImplementedError

    def map(self) -> NDArray[np.uint8]:
        """Return the whole file as read-only memory; only files with a local path can do that."""
        raise NotImplementedError

    def shut(self) -> None:
        """Close a file on disk until the next read. Other files stay open."""

    def check(self) -> None:
        """Raise an error if the file has changed since it was opened, and that can be known."""

    def close(self) -> None:
        """Close the file, unless it belongs to the caller."""

    def measure(self, end: int) -> int:  # noqa: ARG002 - for streams
        """Return the size; for a stream of more than `end` bytes, any number larger than `end`."""
        return self.size

    def fill(self, buffers: list[memoryview], offset: int) -> None:
        """Fill buffers with the bytes at `offset`."""
        while buffers:
            count = self.read_into(buffers, offset)
            if count <= 0:
                raise unread(f"{self.label} was truncated while it was read")
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]

    def read(self, offset: int, size: int) -> bytearray:
        """Read `size` bytes."""
        piece = bytearray(size)
        if size:
            self.fill([memoryview(piece)], offset)
        return piece


class Read(NamedTuple):
    """A range of a source, and the memory to read it into."""

    source: ByteSource
    offset: int
    buffer: memoryview
    is_gap: bool = False  # whether nobody wants its bytes


# The source, the offset, the memory, and how many of the bytes are wanted.
JoinedRead: TypeAlias = tuple[ByteSource, int, list[memoryview], int]


def joined_reads(reads: Iterable[Read], piece: int) -> Iterator[JoinedRead]:
    """Join reads that follow each other in the file, and cut those that are longer than `piece`."""
    source: ByteSource | None = None
    buffers: list[memoryview] = []
    start = size = gaps = 0
    for read in reads:
        buffer, offset = read.buffer, read.offset
        longest = max(piece, read.source.piece)
        if source is not read.source or start + size != offset:
            if source is not None and size:
                yield source, start, buffers, size - gaps
            source, start, buffers, size, gaps = read.source, offset, [], 0, 0
        while len(buffer):
            taken = buffer[: longest - size]
            buffers.append(taken)
            size += len(taken)
            gaps += len(taken) if read.is_gap else 0
            buffer = buffer[len(taken) :]
            if size == longest or len(buffers) == _VECTORS:
                yield read.source, start, buffers, size - gaps
                start, buffers, size, gaps = start + size, [], 0, 0
    if source is not None and size:
        yield source, start, buffers, size - gaps
