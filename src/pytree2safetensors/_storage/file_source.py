"""Opening what a path leads to, for reading: a file, a pipe, a device, or a file in a store.

Specification: *Loading*.
"""

import errno
import mmap
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import FileFormatError, ReplacedError
from pytree2safetensors._messages import shorten
from pytree2safetensors._storage.byte_source import ByteSource
from pytree2safetensors._storage.descriptor import Held
from pytree2safetensors._storage.folder import absolute
from pytree2safetensors._storage.locations import LocalPath
from pytree2safetensors._storage.naming import naming
from pytree2safetensors._storage.remote_file import RemoteSource
from pytree2safetensors._storage.remote_path import RemotePath
from pytree2safetensors._storage.stream import ForwardSource

if sys.platform != "win32":
    import resource

# Before Python 3.13, and on Windows, a map keeps a descriptor of its own.
_IS_TRACKED: Final = sys.version_info < (3, 13) or sys.platform == "win32"
_UNTRACKED: Final[dict[str, Any]] = {} if _IS_TRACKED else {"trackfd": False}


class FileSource(ByteSource):
    """A regular file. After `shut` or `map` it is open only during a read."""

    def __init__(self, label: str, path: str, held: Held, status: os.stat_result) -> None:
        super().__init__(label, status.st_size)
        self.path, self.identity = absolute(path), identity(status)
        self._held, self._descriptor = held, held[-1]
        self._is_shut = False
        # Kept until the end, so that no other file gets its identity.
        self._mapped: NDArray[np.uint8] | None = None
        self._lock = threading.Lock()

    def shut(self) -> None:
        self._is_shut = True
        self._held.close()

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        with self._opened() as descriptor:
            if hasattr(os, "preadv"):
                count: int = os.preadv(descriptor, buffers, offset)
                return count
            with self._lock:  # the system has no positioned reads
                os.lseek(descriptor, offset, os.SEEK_SET)
                piece = os.read(descriptor, len(buffers[0]))
            buffers[0][: len(piece)] = piece
            return len(piece)

    def map(self) -> NDArray[np.uint8]:
        with self._opened() as descriptor:
            if os.fstat(descriptor).st_size < self.size:
                raise FileFormatError(f"{self.label} was truncated while it was read")
            found = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ, **_UNTRACKED)
        self._mapped = np.frombuffer(found, np.uint8)
        self.shut()  # the map keeps the file
        return self._mapped

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Yield the open file. Put its path into errors of the system."""
        try:
            if not self._is_shut:
                yield self._descriptor
                return
            with Held() as held:
                descriptor = self._open_again(held)
                yield descriptor
                self._check(os.fstat(descriptor))
        except OSError as error:
            if error.errno == errno.ESTALE:  # a server no longer has the file
                raise self._replaced() from error
            with naming(self.path):
                raise

    def _open_again(self, held: Held) -> int:
        try:
            descriptor = held.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            raise self._replaced() from None
        if identity(os.fstat(descriptor)) != self.identity:
            raise self._replaced()
        return descriptor

    def _replaced(self) -> ReplacedError:
        return ReplacedError(f"{self.label} was replaced while it was read; load it again")

    def check(self) -> None:
        if self._is_shut and self._mapped is None:  # each read has checked it
            return
        with suppress(OSError):  # it is gone, and what was read is complete
            status = os.stat(self.path) if self._is_shut else os.fstat(self._descriptor)
            if identity(status)[:2] == self.identity[:2]:  # or else another file has the path now
                self._check(status)

    def _check(self, status: os.stat_result) -> None:
        if identity(status) != self.identity:
            raise FileFormatError(f"{self.label} was changed while it was read; load it again")

    def close(self) -> None:
        self._mapped = None
        self._held.close()


class _Pipe(ForwardSource):
    """A pipe or a device with a path."""

    def __init__(self, label: str, path: str, held: Held) -> None:
        super().__init__(label, os.fdopen(held[-1], "rb", closefd=False))
        self.path, self._held = path, held

    def measure(self, end: int) -> int:
        with naming(self.path):
            return super().measure(end)

    def close(self) -> None:
        self.file.close()
        self._held.close()


def open_source(path: LocalPath | RemotePath, *, regular: bool = False) -> ByteSource:
    """Open a file, here or in a store, for reading.

    Raises:
        FileFormatError: It must be a regular file, and is a pipe or a device, which may block.
        OSError: It cannot be opened.
    """
    if isinstance(path, RemotePath):
        return RemoteSource(path)
    where, held = os.fsdecode(path), Held()
    label = shorten(where)
    try:
        waiting = getattr(os, "O_NONBLOCK", 0) if regular else 0
        try:
            descriptor = held.open(where, os.O_RDONLY | waiting)
        except PermissionError:
            if os.path.isdir(where):  # pragma: no cover - Windows does not open it
                raise _is_folder(where) from None
            raise
        with naming(where):
            status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise _is_folder(where)
        if stat.S_ISREG(status.st_mode):
            return FileSource(label, where, held, status)
        if regular:
            raise FileFormatError(f"{label} is a pipe or a device, not a regular file")
        return _Pipe(label, where, held)
    except BaseException:
        held.__exit__()
        raise


def _is_folder(path: str) -> IsADirectoryError:
    return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what distinguishes a file from one that replaces it."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def descriptors_to_keep() -> int:
    """Return how many files may stay open: half of the process's limit."""
    if sys.platform != "win32":
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return 4096 if soft == resource.RLIM_INFINITY else min(4096, soft // 2)
    return 256  # pragma: no cover - Windows
