"""Open files: descriptors that no signal can lose, and writing to them."""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import repeat
from typing import Final

from pytree2safetensors._storage.naming import foreign
from pytree2safetensors._storage.progress import Progress, Report
from pytree2safetensors._types import Chunk

if sys.platform != "win32":
    import fcntl

_STEP: Final = 32 << 20  # bytes of one write, so that progress is told often
_PREALLOCATED: Final = 8 << 20  # bytes: from here on reserving the space first is faster


class Held:
    """At most one open descriptor, which is closed once."""

    def __init__(self) -> None:
        self._open: list[int] = []

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.close()

    __del__ = __exit__  # of what an interrupt takes from its owner

    def open(self, path: str, flags: int, mode: int = 0o777, dir_fd: int | None = None) -> int:
        """Open a file as `os.open` does."""
        flags |= getattr(os, "O_BINARY", 0)
        # No handler of a signal runs between the calls of `map` and `extend`, so that what was opened is never lost.
        self._open.extend(map(partial(os.open, mode=mode, dir_fd=dir_fd), (path,), (flags,)))
        return self._open[-1]

    def close(self) -> None:
        """Close the descriptor if there is one."""
        closing = map(os.close, map(self._open.pop, repeat(-1, len(self._open))))
        any(closing)  # without a handler in between, as in `open`


def write_chunks(
    descriptor: int, chunks: Iterable[Chunk], size: int, progress: Progress | None = None
) -> None:
    """Write bytes to a descriptor in few large calls."""
    report = Report(progress, size)
    preallocate(descriptor, size)
    position = 0
    for offset, piece in cut(chunks):
        if offset != position:
            os.lseek(descriptor, offset, os.SEEK_SET)
        _write_all(descriptor, piece)
        position = offset + len(piece)
        report.add(len(piece))
    report.finish()


def cut(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Cut chunks that are long."""
    iterator = iter(chunks)
    while True:
        with foreign():  # making them runs code of the caller's
            chunk = next(iterator, None)
        if chunk is None:
            return
        offset, piece = chunk
        for start in range(0, len(piece), _STEP):
            yield offset + start, piece[start : start + _STEP]


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
        else:  # a system without positioned writes
            os.lseek(descriptor, offset, os.SEEK_SET)
            count = os.write(descriptor, piece[:_STEP])
        if not count:
            raise OSError(errno.EIO, "the system wrote nothing")
        piece, offset = piece[count:], offset + count


def read_at(descriptor: int, size: int, offset: int) -> bytearray:
    """Read bytes from a place; other threads may read meanwhile where the system can."""
    found = bytearray(size)
    rest = memoryview(found)
    while rest:
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [rest], offset)
        else:  # a system without positioned reads
            os.lseek(descriptor, offset, os.SEEK_SET)
            piece = os.read(descriptor, len(rest))
            count = len(piece)
            rest[:count] = piece
        if not count:
            raise OSError(errno.EIO, "the file is shorter than it was written")
        rest, offset = rest[count:], offset + count
    return found


def reserve(descriptor: int, size: int) -> None:
    """Give a new file its size, and its space where the file system can."""
    preallocate(descriptor, size)
    os.ftruncate(descriptor, size)


def preallocate(descriptor: int, size: int) -> None:
    """Reserve the space of a large file, where the file system can."""
    if size < _PREALLOCATED or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV, errno.ESPIPE}:
            raise


def flush(descriptor: int) -> None:
    """Bring what was written to the disk, and not just to the disk's cache."""
    if sys.platform == "darwin":
        with suppress(OSError):  # a file system that cannot
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)
