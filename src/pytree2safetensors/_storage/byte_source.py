"""Bytes out of files, file objects and maps. `_file` opens files to write; nothing else opens any."""

import errno
import io
import mmap
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pytree2safetensors._errors import FileFormatError, shorten
from pytree2safetensors._storage.progress import Progress, Report

PathLike: TypeAlias = str | os.PathLike[str]

_PIECE: Final = 8 << 20  # bytes of one read
_VECTORS: Final = 512  # buffers of one system call; the least that systems allow is 1024


class HasMethod(type):
    """The type of a class whose instances are all objects that have a method, delegated or not.

    A protocol will not do: since Python 3.12 it looks at classes alone, and files of `tempfile` delegate.
    """

    method: str

    def __instancecheck__(cls, instance: object) -> bool:
        return callable(getattr(instance, cls.method, None))


if TYPE_CHECKING:

    class Readable(Protocol):
        """A binary file object, open for reading."""

        def read(self, size: int = -1, /) -> bytes:
            """Read bytes."""
            ...
else:

    class Readable(metaclass=HasMethod):
        """A binary file object, open for reading."""

        method = "read"


class ByteSource:
    """A file to read at any position, from any thread."""

    def __init__(self, label: str, size: int) -> None:
        self.label, self.size = label, size

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        """Read into buffers, in order; how many bytes arrived."""
        raise NotImplementedError

    def map(self) -> NDArray[np.uint8]:
        """The whole file as read-only memory, of what has a path."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the file."""

    def measure(self, end: int) -> int:  # noqa: ARG002 - for streams
        """The size; of a stream that has more than `end` bytes, something larger than this."""
        return self.size

    def fill(self, buffers: list[memoryview], offset: int) -> None:
        """Fill buffers with what stands at `offset`."""
        while buffers:
            count = self.read_into(buffers, offset)
            if count <= 0:
                raise FileFormatError(f"{self.label} became shorter while it was read")
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]

    def read(self, offset: int, size: int) -> bytearray:
        """Read a piece, whole."""
        piece = bytearray(size)
        if size:
            self.fill([memoryview(piece)], offset)
        return piece


class _Descriptor(ByteSource):
    """A regular file."""

    def __init__(self, label: str, size: int, descriptor: int) -> None:
        super().__init__(label, size)
        self.descriptor = descriptor
        self.lock = threading.Lock()

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        if hasattr(os, "preadv"):
            count: int = os.preadv(self.descriptor, buffers, offset)
            return count
        with self.lock:  # a system without positioned reads
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            piece = os.read(self.descriptor, len(buffers[0]))
        buffers[0][: len(piece)] = piece
        return len(piece)

    def map(self) -> NDArray[np.uint8]:
        if not self.size:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ), np.uint8)

    def identity(self) -> tuple[int, ...]:
        """What differs between this file and another that takes its place."""
        return identity(os.fstat(self.descriptor))

    def close(self) -> None:
        os.close(self.descriptor)


class _Shut(ByteSource):
    """A regular file that is open only while something is read of it."""

    def __init__(self, path: str, source: _Descriptor) -> None:
        super().__init__(source.label, source.size)
        self.path, self.identity = path, source.identity()

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        with closing(self._open()) as source:
            return source.read_into(buffers, offset)

    def map(self) -> NDArray[np.uint8]:
        with closing(self._open()) as source:
            return source.map()

    def _open(self) -> ByteSource:
        source = _open_path(self.path)
        if not isinstance(source, _Descriptor) or source.identity() != self.identity:
            source.close()
            raise FileFormatError(f"{self.label} was replaced while it was read; load it again")
        return source


class _Forward(ByteSource):
    """A stream that cannot seek: kept in memory, as far as somebody asked how long it is."""

    def __init__(self, label: str, file: Any) -> None:
        super().__init__(label, 0)
        self.file, self.content = file, bytearray()

    def measure(self, end: int) -> int:
        while self.size <= end:
            piece = _checked_bytes(self.file.read(min(_PIECE, end + 1 - self.size)), self.label)
            if not piece:
                break
            self.content += piece
            self.size = len(self.content)
        return self.size

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        piece = memoryview(self.content)[offset : offset + len(buffers[0])]
        buffers[0][: len(piece)] = piece
        return len(piece)

    def map(self) -> NDArray[np.uint8]:
        return np.frombuffer(bytes(self.content), np.uint8)


class _Pipe(_Forward):
    """A pipe or a device that has a path."""

    def __init__(self, label: str, descriptor: int) -> None:
        super().__init__(label, os.fdopen(descriptor, "rb"))

    def close(self) -> None:
        self.file.close()


class _Stream(ByteSource):
    """A file object that can seek, from its present position on."""

    def __init__(self, label: str, file: Any) -> None:
        self.file, self.start = file, file.tell()
        file.seek(0, os.SEEK_END)  # which returns the position, or nothing
        super().__init__(label, max(0, file.tell() - self.start))
        self.lock = threading.Lock()

    def read_into(self, buffers: list[memoryview], offset: int) -> int:
        with self.lock:
            self.file.seek(self.start + offset)
            piece = _checked_bytes(self.file.read(len(buffers[0])), self.label)
        buffers[0][: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        with suppress(ValueError):  # the caller may have closed it
            self.file.seek(self.start + self.size)


def open_source(path: PathLike | Readable) -> ByteSource:
    """Open a file, or a file object, for reading."""
    if isinstance(path, str | os.PathLike):
        return _open_path(os.fsdecode(path))
    label = _label_of(path)
    if isinstance(path, io.TextIOBase):  # some of whose bytes may be no text
        raise _no_bytes(str, label)
    seekable = getattr(path, "seekable", None)
    if seekable is not None and seekable():
        source = _Stream(label, path)
        if source.start and not source.size:
            raise FileFormatError(
                f"{label} has 0 bytes after its position; seek to where the data begin"
            )
        return source
    return _Forward(label, path)


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What differs between a file and another that takes its place."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def shut(path: str, source: ByteSource) -> ByteSource:
    """The same file, closed, and opened again whenever it is read."""
    if not isinstance(source, _Descriptor):
        return source
    with closing(source):
        return _Shut(path, source)


def _checked_bytes(content: Any, label: str) -> bytes | bytearray | memoryview:
    if not isinstance(content, bytes | bytearray | memoryview):
        raise _no_bytes(type(content), label)
    return content


def _no_bytes(kind: type, label: str) -> TypeError:
    return TypeError(f"{label} gives {kind.__name__}, not bytes; open it in binary mode")


def _label_of(file: Any) -> str:
    name = getattr(file, "name", None)
    return shorten(name) if isinstance(name, str) else f"the {type(file).__name__}"


def _open_path(path: str) -> ByteSource:
    label = shorten(path)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if stat.S_ISREG(status.st_mode):
            return _Descriptor(label, status.st_size, descriptor)
        return _Pipe(label, descriptor)
    except BaseException:
        os.close(descriptor)
        raise


class Read(NamedTuple):
    """A range of a source, and the memory that it goes to."""

    source: ByteSource
    offset: int
    buffer: memoryview


def read_ranges(reads: Iterable[Read], progress: Progress | None = None) -> None:
    """Carry out reads, neighbouring ones together, large ones by several threads."""
    batches = list(_batches(reads))
    total = sum(size for _, _, _, size in batches)
    report = Report(progress, total)
    workers = min(4, os.cpu_count() or 1, len(batches))

    def run(batch: tuple[ByteSource, int, list[memoryview], int]) -> None:
        source, offset, buffers, size = batch
        source.fill(buffers, offset)
        report.add(size)

    if workers <= 1 or total < _PIECE:
        for batch in batches:
            run(batch)
    else:
        with ThreadPoolExecutor(workers, "pytree2safetensors-read") as pool:
            for _ in pool.map(run, batches):
                pass
    report.finish()


def _batches(reads: Iterable[Read]) -> Iterator[tuple[ByteSource, int, list[memoryview], int]]:
    """Join reads that follow each other in the file, and cut those that are long."""
    source: ByteSource | None = None
    buffers: list[memoryview] = []
    start = size = 0
    for read in reads:
        buffer, offset = read.buffer, read.offset
        if source is not read.source or start + size != offset:
            if source is not None and size:
                yield source, start, buffers, size
            source, start, buffers, size = read.source, offset, [], 0
        while len(buffer):
            taken = buffer[: _PIECE - size]
            buffers.append(taken)
            size += len(taken)
            buffer = buffer[len(taken) :]
            if size == _PIECE or len(buffers) == _VECTORS:
                yield read.source, start, buffers, size
                start, buffers, size = start + size, [], 0
    if source is not None and size:
        yield source, start, buffers, size
