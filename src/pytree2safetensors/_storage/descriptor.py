"""File descriptors that a signal cannot leak, and reading and writing with them."""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import repeat
from typing import Final

from pytree2safetensors._errors import FileFormatError
from pytree2safetensors._storage.naming import not_naming
from pytree2safetensors._storage.progress import Progress, Report
from pytree2safetensors._types import Chunk

if sys.platform != "win32":
    import fcntl

_STEP: Final = 32 << 20  # bytes of one write, so that progress is reported often
_PREALLOCATED: Final = 8 << 20  # bytes: reserving the space of larger files first is faster
# How file systems say that they cannot reserve space.
_CANNOT_RESERVE: Final = frozenset(
    {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.ESPIPE}
)


class Held(list[int]):
    """Holds at most one open descriptor, and closes it once.

    It is a list because an interrupt may come before any `__init__`.
    """

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.close()

    def __del__(self) -> None:
        if self:  # an interrupt took it from its owner; `__exit__` fails if the interpreter exits
            self.__exit__()

    def open(self, path: str, flags: int, mode: int = 0o777, dir_fd: int | None = None) -> int:
        """Open a file as `os.open` does."""
        flags |= getattr(os, "O_BINARY", 0)
        # No signal handler runs between `map` and `extend`, so an open descriptor is never lost.
        self.extend(map(partial(os.open, mode=mode, dir_fd=dir_fd), (path,), (flags,)))
        return self[-1]

    def close(self) -> None:
        """Close the descriptor if there is one."""
        closing = map(os.close, map(self.pop, repeat(-1, len(self))))
        any(closing)  # no signal handler runs in between, as in `open`


def write_chunks(
    descriptor: int, chunks: Iterable[Chunk], size: int, progress: Progress | None = None
) -> None:
    """Write bytes to a descriptor in few large calls."""
    report = Report(progress, size)
    _preallocate(descriptor, size)
    position = 0
    for offset, piece in cut_chunks(chunks, size):
        if offset != position:
            os.lseek(descriptor, offset, os.SEEK_SET)
        _write_all(descriptor, piece)
        position = offset + len(piece)
        report.add(len(piece))
        del piece  # the next one may need the memory
    report.finish()


def cut_chunks(chunks: Iterable[Chunk], size: int) -> Iterator[Chunk]:
    """Split long chunks.

    Raises:
        FileFormatError: They do not have `size` bytes together.
    """
    iterator = iter(chunks)
    rest = size
    while True:
        with not_naming():  # making them runs the caller's code
            chunk = next(iterator, None)
        if chunk is None:
            break
        offset, piece = chunk
        rest -= len(piece)
        for start in range(0, len(piece), _STEP):
            yield offset + start, piece[start : start + _STEP]
        del chunk, piece  # the next one may need the memory
    if rest:
        raise FileFormatError(
            "an array changed its size while it was saved; save a copy of it, or use "
            "save_pytree_async, which copies the tree"
        )


def _write_all(descriptor: int, piece: memoryview) -> None:
    while len(piece):
        count = os.write(descriptor, piece)
        if not count:
            raise OSError(errno.EIO, "the system wrote nothing")
        piece = piece[count:]


def write_at(descriptor: int, piece: memoryview, offset: int) -> None:
    """Write bytes at an offset; the bytes before it may be written later."""
    while len(piece):
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, piece[:_STEP], offset)
        else:  # the system has no positioned writes
            os.lseek(descriptor, offset, os.SEEK_SET)
            count = os.write(descriptor, piece[:_STEP])
        if not count:
            raise OSError(errno.EIO, "the system wrote nothing")
        piece, offset = piece[count:], offset + count


def read_at(descriptor: int, size: int, offset: int) -> bytearray:
    """Read bytes at an offset; other threads may read at the same time if the system can."""
    found = bytearray(size)
    rest = memoryview(found)
    while rest:
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [rest], offset)
        else:  # the system has no positioned reads
            os.lseek(descriptor, offset, os.SEEK_SET)
            piece = os.read(descriptor, len(rest))
            count = len(piece)
            rest[:count] = piece
        if not count:
            raise OSError(errno.EIO, "the file is shorter than it was written")
        rest, offset = rest[count:], offset + count
    return found


def set_size(descriptor: int, size: int) -> None:
    """Set the size of a new file that other processes write to.

    This reserves no space. Where a file system cannot, the C library writes zeros instead, and a
    network file system could send them after the bytes of the other processes.
    """
    os.ftruncate(descriptor, size)


def _preallocate(descriptor: int, size: int) -> None:
    """Reserve the space of a large file if the file system can."""
    if size < _PREALLOCATED or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise


def flush(descriptor: int) -> None:
    """Flush a file to the disk, not just to the disk's cache."""
    if sys.platform == "darwin":
        with suppress(OSError):  # the file system cannot
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
